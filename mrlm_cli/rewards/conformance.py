"""Does a reward keep its word? For the built-in rules and for yours:

    def test_my_reward():
        assert problems(MyReward(MyReward.Config(type="./my_reward.py:MyReward")), [transcript]) == []

The reward runs in the calling process, without a deadline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mrlm_cli.envs.conformance import HOSTILE
from mrlm_cli.envs.wire import describe_exception
from mrlm_cli.records import Message, Transcript
from mrlm_cli.rewards.base import Failure, Outcome, Reward
from mrlm_cli.rewards.wire import checked


def problems(reward: Reward, transcripts: Sequence[Transcript]) -> list[str]:
    """What is wrong with a reward, one sentence each; empty if nothing was found.

    Scores the transcripts, which it must be able to, and copies of the first in which every agent says one of HOSTILE;
    looks at the number of outcomes, agents, ranges, and that the same is given again, alone and in another order.
    """
    hostile = [_saying(transcripts[0], text) for text in HOSTILE]
    return [*_scored(reward, transcripts), *_scored(reward, hostile)]


def _scored(reward: Reward, transcripts: Sequence[Transcript]) -> Iterator[str]:
    first = _outcomes(reward, transcripts)
    for place, (one, outcome) in enumerate(zip(transcripts, first, strict=True)):
        if isinstance(outcome, Failure):
            yield f"transcript {place}: {outcome.text}"
        elif _outcomes(reward, [one]) != [outcome]:
            yield f"transcript {place}: scored again, alone, it is given another value"
    if _outcomes(reward, transcripts[::-1]) != first[::-1]:
        yield "the values depend on the order of the transcripts"


def _outcomes(reward: Reward, transcripts: Sequence[Transcript]) -> list[Outcome]:
    """What the reward gives to chunks of the size that it asks for."""
    found: list[Outcome] = []
    for start in range(0, len(transcripts), reward.at_once):
        chunk = transcripts[start : start + reward.at_once]
        try:
            given = list(reward.score(chunk))
        except Exception as error:
            found += [Failure(describe_exception(error))] * len(chunk)
            continue
        if len(given) != len(chunk):
            found += [Failure(f"{len(given)} outcomes for {len(chunk)} transcripts")] * len(chunk)
            continue
        found += [checked(outcome, one, reward.config) for outcome, one in zip(given, chunk, strict=True)]
    return found


def _saying(one: Transcript, text: str) -> Transcript:
    """The transcript with every reply replaced."""
    views = {
        agent: tuple(Message("assistant", text) if message.role == "assistant" else message for message in view)
        for agent, view in one.views.items()
    }
    return replace(one, views=views)
