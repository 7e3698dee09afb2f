"""Episodes of a scripted policy: sessions run in message space, without a model and without tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mrlm_cli.draws import draw_key, integer
from mrlm_cli.envs.host import Host
from mrlm_cli.envs.scripted import Script
from mrlm_cli.errors import SessionFailure
from mrlm_cli.records import Episode, EpisodeStop, Message, Reply, Task, Transcript, Turn
from mrlm_cli.rewards.base import PREFIX, Failure
from mrlm_cli.rewards.firewall import Scorers
from mrlm_cli.training.rollout import UNSCORED, Draw


@dataclass(slots=True)
class _Live:
    name: str
    key: tuple[int | str, ...]
    task: Task
    sample: int
    views: dict[str, list[Message]] = field(default_factory=dict)
    rewards: list[tuple[str, int, str, float]] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    spoken: dict[str, int] = field(default_factory=dict)  # replies by agent
    speaker: str = ""
    stop: EpisodeStop | None = None
    failure: str | None = None


class ScriptedRollout:
    """Stands where a Rollout stands in an evaluation. Every agent of a session speaks by the same script."""

    def __init__(
        self,
        host: Host,
        script: Script,
        *,
        max_turns: int,
        phase: Callable[[str, int, int], None],
        scorers: Scorers | None = None,
    ) -> None:
        self._host = host
        self._script = script
        self._scorers = scorers
        self._max_turns = max_turns
        self._phase = phase

    def episodes(self, tasks: Sequence[Task], samples: int, draw: Draw, temperature: float) -> list[Episode]:
        """`samples` episodes of each task, with no tokens; their one reward is the weighted sum of components."""
        sessions = [
            _Live(
                f"{draw.stream}/{draw.policy_step}/{task.env}/{task.id}/{number}.{sample}",
                (draw.seed, draw.stream, draw.step, number, task.env, task.id, sample),
                task,
                sample,
            )
            for number, task in enumerate(tasks)
            for sample in range(samples)
        ]
        live = sessions
        ticket = self._host.open([(one.name, one.task, integer(2**63, "session", *one.key)) for one in live])
        while live:
            turns = self._host.collect(ticket)
            for one in live:
                self._hear(one, turns[one.name])
            self._host.close([one.name for one in live if one.stop is not None])
            live = [one for one in live if one.stop is None]
            self._phase(f"{draw.stream}: playing", len(sessions) - len(live), len(sessions))
            if live:
                ticket = self._host.step([(one.name, self._say(one)) for one in live])
        if self._scorers is not None:
            self._score(self._scorers, [one for one in sessions if one.stop != "failed"])
        return [episode for one in sessions for episode in self._episodes(one)]

    def _score(self, scorers: Scorers, sessions: Sequence[_Live]) -> None:
        given = scorers.score([(one.name, _transcript(one)) for one in sessions])
        for one, outcomes in zip(sessions, given, strict=True):
            for label, outcome in outcomes.items():
                if isinstance(outcome, Failure):
                    one.stop, one.failure = "failed", f"{UNSCORED}{label}: {outcome.text}"
                else:
                    turns = {agent: max(0, one.spoken.get(agent, 0) - 1) for agent in outcome}
                    one.rewards += [(whom, turns[whom], f"{PREFIX}{label}", outcome[whom]) for whom in outcome]

    def _hear(self, one: _Live, turn: Turn | SessionFailure) -> None:
        if isinstance(turn, SessionFailure):
            one.stop, one.failure = "failed", str(turn)
            return
        for agent, components in turn.rewards.items():
            place = max(0, one.spoken.get(agent, 0) - 1)
            one.rewards += [(agent, place, name, float(value)) for name, value in components.items()]
        one.facts.update(turn.facts)
        one.views.setdefault(turn.agent, []).extend(turn.messages)
        one.speaker = turn.agent
        if turn.done:
            one.stop = "turns" if turn.truncated else "done"
        elif one.spoken.get(turn.agent, 0) >= self._max_turns:
            one.stop = "turns"

    def _say(self, one: _Live) -> Reply:
        turn = one.spoken.get(one.speaker, 0)
        key = draw_key("reply", *one.key, one.speaker)
        message = Message("assistant", self._script(self._host.environments[one.task.env], one.task, turn, key))
        one.views[one.speaker].append(message)
        one.spoken[one.speaker] = turn + 1
        return Reply(message, "end")

    def _episodes(self, one: _Live) -> list[Episode]:
        assert one.stop is not None
        environment = self._host.environments[one.task.env]
        weights = environment.reward_weights(environment.config)
        if self._scorers is not None:
            weights |= {f"{PREFIX}{label}": weight for label, weight in self._scorers.weights.items()}
        transcript = _transcript(one)
        return [
            Episode(
                id=f"{one.name}/{agent}",
                session=one.name,
                task=one.task,
                group=f"{one.task.env}/{one.task.id}/{agent}",
                sample=one.sample,
                agent=agent,
                tokens=(),
                spans=(),
                logprobs=(),
                rewards=(sum(weights[name] * value for whom, _, name, value in one.rewards if whom == agent),),
                transcript=transcript,
                stop=one.stop,
                ended=one.failure is None,
                failure=one.failure,
            )
            for agent in (one.views or environment.roles(environment.config)[:1])
        ]


def _transcript(one: _Live) -> Transcript:
    assert one.stop is not None
    return Transcript(
        task=one.task,
        sample=one.sample,
        views={agent: tuple(view) for agent, view in one.views.items()},
        rewards=tuple(one.rewards),
        facts=one.facts,
        stop=one.stop,
        failure=one.failure,
    )
