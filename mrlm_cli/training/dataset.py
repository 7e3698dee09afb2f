"""Which rows a step is made of, and their episodes: what the rollout source is for environments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from mrlm_cli.data.base import AGENT, LABEL, Group
from mrlm_cli.data.load import Loaded
from mrlm_cli.draws import permuted
from mrlm_cli.errors import CheckpointError, UserError
from mrlm_cli.policy.chat import Chat
from mrlm_cli.policy.written import written
from mrlm_cli.records import Episode, Span, Split, Transcript
from mrlm_cli.strict import DataSettings
from mrlm_cli.training.fitting import is_unfit
from mrlm_cli.training.rollout import EXCLUDED

_Tokens = tuple[tuple[int, ...], tuple[Span, ...]]
_TOLD = 5  # rows left out that are named on the screen; all are counted


class DatasetSource:
    """Training rows in a keyed order of their own in each epoch.

    Its whole state is a cursor, and how many of the rows before it do not fit.
    """

    def __init__(
        self, loaded: Loaded, chat: Chat, settings: DataSettings, seed: int, warn: Callable[[str], None]
    ) -> None:
        self._loaded = loaded
        self._chat = chat
        self._rows = settings.rows_per_step
        self._seed = seed
        self._warn = warn
        self._max_tokens = min(settings.max_tokens or chat.context, chat.context)
        self._cursor = 0
        self._unfit = 0
        self._told: set[str] = set()

    def episodes(self, step: int) -> list[Episode]:
        """The episodes of a step; advances the cursor."""
        begin, self._cursor = self._cursor, self._cursor + self._rows
        drawn = [self._at(position, f"train/{step}") for position in range(begin, self._cursor)]
        # The first epoch has each row once.
        self._unfit += sum(is_unfit(group[0]) for group in drawn[: max(0, self.rows - begin)])
        return [one for group in drawn for one in group]

    def left_out(self) -> str | None:
        """A sentence about the training rows that did not fit so far, if any did not."""
        if self._unfit == 0:
            return None
        return f"data: in all, {self._unfit} of {min(self._cursor, self.rows)} training rows left out"

    @property
    def holds_out(self) -> bool:
        """Whether any row is held out for evaluations of the run."""
        return bool(self._loaded.validation)

    @property
    def rows(self) -> int:
        """Training rows, pairs counted once."""
        return len(self._loaded.train)

    def any_fits(self) -> bool:
        """Whether any training row fits the limits."""
        return any(self._tokens(group)[1] is None for group in self._loaded.train)

    def held_out(self, count: int, split: Split = "validation") -> list[Episode]:
        """Episodes of the first `count` rows of a held-out split in a fixed mixed order; fewer if there are fewer."""
        groups = self._loaded.test if split == "test" else self._loaded.validation
        places = [permuted(place, len(groups), "held out order") for place in range(min(count, len(groups)))]
        return [one for place in places for one in self._written(groups[place], f"{split}/{place}")]

    def first_drawn(self, index: int) -> list[Episode]:
        """The episodes of that step of the first epoch which draws the training row of this index."""
        begin = self._first_places[index] // self._rows * self._rows
        end = min(begin + self._rows, len(self._loaded.train))
        return [one for position in range(begin, end) for one in self._at(position, "first")]

    def state(self) -> dict[str, Any]:
        """Rows taken so far, those of them that do not fit, and what they were."""
        return {"cursor": self._cursor, "unfit": self._unfit, "data": self._loaded.sha256}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises CheckpointError if the rows are others by now."""
        if state["data"] != self._loaded.sha256:
            raise CheckpointError(
                "the rows of the recipe's data have changed since the run began: it cannot go on. If it began before "
                "data.test_share existed, no row was kept for a test: write test_share: 0 into its recipe.yaml"
            )
        self._cursor = int(state["cursor"])
        self._unfit = int(state.get("unfit", 0))  # an older version did not count them

    def _at(self, position: int, name: str) -> list[Episode]:
        groups = self._loaded.train
        epoch, place = divmod(position, len(groups))
        return self._written(groups[self._index(epoch, place)], f"{name}/{position}")

    def _index(self, epoch: int, place: int) -> int:
        return permuted(place, len(self._loaded.train), self._seed, "order", LABEL, epoch)

    @cached_property
    def _first_places(self) -> dict[int, int]:
        """Index of a row's task → its place in the first epoch."""
        groups = self._loaded.train
        return {groups[self._index(0, place)][0].task.index: place for place in range(len(groups))}

    def _written(self, group: Group, session: str) -> list[Episode]:
        """The group's episodes; if one of them cannot be had, none can: a pair is whole or left out."""
        made, failure = self._tokens(group)
        if failure is not None:
            failure = f"{EXCLUDED}{group[0].task.data['place']}: {failure}"
            self._tell(failure)
            made = [((), ())] * len(group)
        return [
            _episode(each, session, tokens, spans, failure) for each, (tokens, spans) in zip(group, made, strict=True)
        ]

    def _tokens(self, group: Group) -> tuple[list[_Tokens], str | None]:
        """Tokens and spans of the group's transcripts, and why one cannot be had, if so."""
        made: list[_Tokens] = []
        failure = None
        for each in group:
            try:
                tokens, spans = written(self._chat, each.views[AGENT], int(each.task.data["given"]))
            except UserError as error:  # the model's chat template refuses the row
                failure = str(error)
                break
            if len(tokens) > self._max_tokens:
                failure = f"{len(tokens)} tokens are more than the limit of {self._max_tokens}"
                break
            made.append((tokens, spans))
        if failure is None and len({tokens for tokens, _ in made}) < len(made):
            failure = "both sides are the same tokens"
        return made, failure

    def _tell(self, failure: str) -> None:
        if failure not in self._told and len(self._told) < _TOLD:
            self._told.add(failure)
            self._warn(f"data: {failure}")


def _episode(
    transcript: Transcript, session: str, tokens: Sequence[int], spans: Sequence[Span], failure: str | None
) -> Episode:
    rewards = [0.0] * len(tokens)
    chosen = [span for span in spans if span.kind == "chosen"]
    if chosen:
        rewards[chosen[-1].end - 1] = sum(value for *_, value in transcript.rewards)
    return Episode(
        id=f"{session}/{AGENT}.{transcript.sample}",
        session=f"{session}.{transcript.sample}",
        task=transcript.task,
        group=f"{LABEL}/{session}/{AGENT}",
        sample=transcript.sample,
        agent=AGENT,
        tokens=tuple(tokens),
        spans=tuple(spans),
        logprobs=(0.0,) * len(tokens),
        rewards=tuple(rewards),
        transcript=transcript,
        stop="done" if failure is None else "failed",
        ended=failure is None,
        failure=failure,
    )
