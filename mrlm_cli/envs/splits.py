"""Held-out splits: whole classes of equivalent tasks, ranked by a hash of their canonical form.

A class never crosses a border, so no task of one split is a symmetric image of a task of another. The hash is
cryptographic: an arithmetic one holds out a pattern (for example every sum divisible by ten) instead of a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mrlm_cli.records import Split

HELD_OUT_SHARE = 0.1  # of the classes, for validation and again for test


def split_classes(classes: Sequence[str]) -> dict[Split, list[int]]:
    """Indices of `classes` by split: a tenth (at least one) for validation and for test each, the rest to train on.

    `classes` are distinct canonical forms. Raises ValueError for fewer than three.
    """
    if len(classes) < 3:
        raise ValueError(f"{len(classes)} classes of tasks cannot be split in three")
    order = sorted(range(len(classes)), key=lambda i: hashlib.blake2b(classes[i].encode(), digest_size=16).digest())
    held_out = max(1, int(len(classes) * HELD_OUT_SHARE))
    return {
        "validation": sorted(order[:held_out]),
        "test": sorted(order[held_out : 2 * held_out]),
        "train": sorted(order[2 * held_out :]),
    }
