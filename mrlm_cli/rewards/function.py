"""A function of one's own as a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from mrlm_cli.records import Transcript
from mrlm_cli.registry import function
from mrlm_cli.rewards.base import Reward, RewardSettings
from mrlm_cli.strict import Names


class Function(Reward):
    """Any Python function of a finished session: f(transcript) gives a number for every agent, or {agent: number}.

    It must give the same for the same transcript, or a resume is not exact.
    """

    class Config(RewardSettings):
        """Which function."""

        path: Annotated[str, Field(pattern=":"), Names("function")]
        """./my_reward.py:name beside the recipe or in the working directory, or package.module:name."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._function = function(config.path)

    def score(self, transcripts: Sequence[Transcript]) -> list[Mapping[str, Any]]:
        """The function's number for each transcript."""
        values = [self._function(transcript) for transcript in transcripts]
        return [
            value if isinstance(value, Mapping) else dict.fromkeys(transcript.views, value)
            for transcript, value in zip(transcripts, values, strict=True)
        ]
