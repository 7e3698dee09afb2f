"""Episodes → a right-padded batch, and the ways a batch is cut up again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch

from mrlm_cli.records import Batch, Episode


def collate(episodes: Sequence[Episode], device: str, *, pairs: bool = False, observed: bool = False) -> Batch | None:
    """A batch of the episodes that can be trained on; None if there is none.

    Left out are those that failed, hold no chosen token, or belong to a group that the algorithm does not keep.

    Weights are the mask and mass the number of chosen tokens, until an algorithm says otherwise. With `pairs` the
    episodes of a group that saw the same prompt are one unit; with `observed` observations are marked, and scored too.
    """
    rows = [(number, one) for number, one in enumerate(episodes) if trainable(one)]
    if not rows:
        return None
    longest = max(len(one.tokens) for _, one in rows)

    def padded(lists: Iterable[Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([list(items) + [0] * (longest - len(items)) for items in lists], dtype=dtype, device=device)

    def column(items: Iterable[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(list(items), dtype=dtype, device=device)

    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (_, one) in enumerate(rows):
        mask[row, one.chosen] = True
    mask = mask.to(device)
    seen = _observations(rows, longest).to(device) if observed else None
    groups = _numbered(one.group for _, one in rows)
    agents = _numbered(one.agent for _, one in rows)
    # Answers to different questions are no pair, even where an environment asks them under one task.
    units = _numbered((one.group, one.tokens[: one.chosen[0]]) for _, one in rows) if pairs else range(len(rows))
    return Batch(
        tokens=padded((one.tokens for _, one in rows), torch.int64),
        lengths=column((len(one.tokens) for _, one in rows), torch.int64),
        mask=mask,
        score=mask if seen is None else mask | seen,
        logprobs=padded((one.logprobs for _, one in rows), torch.float32),
        rewards=padded((one.rewards for _, one in rows), torch.float32),
        weights=mask.float(),
        mass=mask.sum(1).float(),
        episode=column((number for number, _ in rows), torch.int64),
        group=column(groups, torch.int64),
        unit=column(units, torch.int64),
        truncated=column((one.stop in ("length", "turns") for _, one in rows), torch.bool),
        ended=column((one.ended for _, one in rows), torch.bool),
        agent=column(agents, torch.int64) if len(set(agents)) > 1 else None,
        observed=seen,
    )


def _numbered(names: Iterable[Hashable]) -> list[int]:
    """Each name's number in the order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


def trainable(episode: Episode) -> bool:
    """Whether an episode may enter a batch."""
    return episode.stop != "failed" and episode.left_out is None and bool(episode.chosen)


def _observations(rows: Sequence[tuple[int, Episode]], longest: int) -> torch.Tensor:
    seen = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (_, one) in enumerate(rows):
        for span in one.spans:
            if span.kind == "observation":
                seen[row, span.start : span.end] = True
    return seen


def unit_rows(batch: Batch) -> dict[int, list[int]]:
    """Unit → its rows, both in the order of the batch."""
    units: dict[int, list[int]] = {}
    for row, unit in enumerate(batch.unit.tolist()):
        units.setdefault(unit, []).append(row)
    return units


def micro_batches(batch: Batch, budget: int) -> list[torch.Tensor]:
    """Row indices cut into micro-batches of at most `budget` padded tokens, longest first, units kept whole.

    A unit that is larger than the budget makes a micro-batch of its own. Units of one group stay together, because what
    their rows begin with in common is computed once where the model allows; among and inside groups, sorting by length
    keeps padding small. Ties keep their order, so the cut is a function of lengths and groups alone.
    """
    units = unit_rows(batch)
    lengths, groups = batch.lengths.tolist(), batch.group.tolist()
    longest_of: dict[int, int] = {}
    for length, group in zip(lengths, groups, strict=True):
        longest_of[group] = max(length, longest_of.get(group, 0))

    def order(rows: list[int]) -> tuple[int, int, int]:
        group = groups[rows[0]]
        return -longest_of[group], group, -max(lengths[row] for row in rows)

    ordered = sorted(units.values(), key=order)
    cut: list[list[int]] = []
    longest = 0
    for rows in ordered:
        if cut and (len(cut[-1]) + len(rows)) * longest <= budget:
            cut[-1].extend(rows)
        else:
            cut.append(list(rows))
            longest = max(longest_of[groups[row]] for row in rows)
    return [torch.tensor(rows, dtype=torch.int64, device=batch.lengths.device) for rows in cut]
