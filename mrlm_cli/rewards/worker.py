"""A worker process of rewards. `python -m mrlm_cli.rewards.worker`, over the pipes of `envs/worker.py`:

    {"op": "init", "folders": [...], "rewards": {label: {"type": ..., "config": JSON text}}}   -> {"outcomes": []}
    {"op": "score", "reward": label, "transcripts": [JSON text, ...]}                          -> {"outcomes": [...]}

with a "trace" of what it raised, or {"failure": text} where a reward cannot be made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrlm_cli.envs.troubles import trace
from mrlm_cli.envs.wire import describe_exception
from mrlm_cli.envs.worker import serve
from mrlm_cli.registry import resolve
from mrlm_cli.rewards.base import Failure, Reward
from mrlm_cli.rewards.wire import checked, outcome_to_json, transcript_from_json


class Rewards:
    """The rewards of this process."""

    def __init__(self) -> None:
        self._rewards: dict[str, Reward] = {}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The outcomes that a request leads to."""
        if request["op"] == "init":
            sys.path[:0] = request["folders"]
            for label, settings in request["rewards"].items():
                found = resolve("rewards", settings["type"], [Path(folder) for folder in request["folders"]])
                reward = self._rewards[label] = found(found.Config.model_validate_json(settings["config"]))
                reward.prepare()
            return {"outcomes": []}
        return self._score(self._rewards[request["reward"]], request["transcripts"])

    def _score(self, reward: Reward, given: list[str]) -> dict[str, Any]:
        transcripts = [transcript_from_json(json.loads(text)) for text in given]
        try:
            outcomes = list(reward.score(transcripts))
        except BaseException as error:  # a border: a reward's code may raise anything, SystemExit included
            outcome = {"failure": describe_exception(error)}
            return {"outcomes": [outcome] * len(transcripts), "trace": trace(error)}
        if len(outcomes) != len(transcripts):
            failure = Failure(f"it gave {len(outcomes)} outcomes for {len(transcripts)} transcripts")
            return {"outcomes": [outcome_to_json(failure)] * len(transcripts)}
        pairs = zip(outcomes, transcripts, strict=True)
        return {"outcomes": [outcome_to_json(checked(outcome, one, reward.config)) for outcome, one in pairs]}


if __name__ == "__main__":
    serve(Rewards().answer)
