"""Transcripts and outcomes as JSON, and the check that a reward keeps its word."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from numbers import Real
from typing import Any

from mrlm_cli.envs.wire import task_from_json, task_to_json
from mrlm_cli.records import Message, Transcript
from mrlm_cli.rewards.base import Failure, Outcome, RewardSettings


def transcript_to_json(one: Transcript) -> dict[str, Any]:
    """A transcript as JSON-able dict."""
    return {
        "task": task_to_json(one.task),
        "sample": one.sample,
        "views": {agent: [asdict(message) for message in view] for agent, view in one.views.items()},
        "rewards": [list(each) for each in one.rewards],
        "facts": dict(one.facts),
        "stop": one.stop,
    }


def transcript_from_json(fields: Mapping[str, Any]) -> Transcript:
    """What `transcript_to_json` gave."""
    views = {
        agent: tuple(Message(**{**each, "tool_calls": tuple(each["tool_calls"])}) for each in view)
        for agent, view in fields["views"].items()
    }
    rewards = tuple((agent, turn, name, value) for agent, turn, name, value in fields["rewards"])
    return Transcript(task_from_json(fields["task"]), fields["sample"], views, rewards, fields["facts"], fields["stop"])


def checked(outcome: Any, transcript: Transcript, settings: RewardSettings) -> Outcome:
    """The same outcome with plain floats, or a Failure that says what is wrong with it."""
    if isinstance(outcome, Failure):
        return outcome
    if not isinstance(outcome, Mapping):
        return Failure(f"expected numbers by agent, got {outcome!r:.100}")
    values: dict[str, float] = {}
    for agent, value in outcome.items():
        if agent not in transcript.views:
            return Failure(f"it scored agent {agent!r}, who is not one of {', '.join(transcript.views)}")
        if isinstance(value, bool) or not isinstance(value, Real):
            return Failure(f"expected a number, got {value!r:.100}")
        try:
            number = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            number = math.inf
        if not math.isfinite(number):
            return Failure(f"its value is {number}")
        if not settings.low <= number <= settings.high:
            return Failure(f"its value {number:g} is outside {settings.low:g} to {settings.high:g} (low and high)")
        values[agent] = number
    return values


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """A checked outcome as JSON-able dict."""
    return {"failure": outcome.text} if isinstance(outcome, Failure) else {"values": dict(outcome)}


def outcome_from_json(fields: Mapping[str, Any]) -> Outcome:
    """What `outcome_to_json` gave."""
    return Failure(fields["failure"]) if "failure" in fields else dict(fields["values"])
