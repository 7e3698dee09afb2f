"""The reference's log-probs of a dataset's rows: each computed once, kept, and equal to the bit after a resume."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mrlm_cli.policy.model import Policy
from mrlm_cli.records import Batch, Episode
from mrlm_cli.training.collate import collate, micro_batches
from mrlm_cli.training.dataset import DatasetSource

Key = tuple[str, int, int]


class CachedReference:
    """log π_ref of the chosen tokens of every row that was asked for, in host memory.

    Floating point depends on shapes, so a training row is always scored in the company in which the first epoch draws
    it, whenever it is asked for; held-out rows are scored in the company of their evaluation, which is always the same.
    """

    def __init__(self, policy: Policy, source: DatasetSource, *, budget: int) -> None:
        self._policy = policy
        self._source = source
        self._budget = budget
        self._known: dict[Key, torch.Tensor] = {}  # [chosen tokens] of the row

    def logprobs(self, batch: Batch, episodes: Sequence[Episode]) -> torch.Tensor:
        """[B,T], zero outside the chosen tokens; `batch.episode` are indices into `episodes`."""
        ones = [episodes[number] for number in batch.episode.tolist()]
        for one in ones:
            if _key(one) in self._known:
                continue
            if one.task.split == "train":
                company = self._source.first_drawn(one.task.index)
                together = collate(company, str(batch.tokens.device))
                assert together is not None
                self._score(together, company)
            else:
                self._score(batch, episodes)
        found = torch.zeros(batch.mask.shape, device=batch.mask.device)
        for row, one in enumerate(ones):
            found[row, batch.mask[row]] = self._known[_key(one)].to(found.device)
        return found

    @torch.no_grad()
    def _score(self, batch: Batch, episodes: Sequence[Episode]) -> None:
        for rows in micro_batches(batch, self._budget):
            part = batch.rows(rows)
            out = self._policy(part.tokens, part.lengths, part.mask, temperature=1.0, entropy=False, values=False)
            for row, number in enumerate(part.episode.tolist()):
                self._known.setdefault(_key(episodes[number]), out.logprobs[row, part.mask[row]].cpu())


def _key(one: Episode) -> Key:
    return one.task.split, one.task.index, one.sample
