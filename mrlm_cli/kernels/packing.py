"""Rows of tokens as the nodes of their prefix tree: what rows begin with in common is computed once.

A causal model's state at a position is a function of the tokens up to there. Rows that share a beginning (a system
prompt, the prompt of several samples) therefore share its states, and a batch needs one state for each distinct
prefix. There is no padding among the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packing:
    """N distinct prefixes of B rows of at most T tokens."""

    tokens: Tensor  # int64 [N]: the last token of each prefix
    positions: Tensor  # int64 [N]: its place in its row
    node: Tensor  # int64 [B,T]: the prefix that ends at each place; 0 behind the end of a row
    owner: Tensor  # int64 [N]: one place b*T+t with node[b,t] == n, for each n
    holders: Tensor  # int64 [B*T]: all places b*T+t, those of node 0 first, then those of node 1, ...
    starts: Tensor  # int64 [N+1]: where each node's begin among them, and their number
    plain: bool  # nothing is shared and nothing is padded: node is 0 .. B*T-1 in order

    @property
    def rows(self) -> tuple[int, int]:
        """(B, T)."""
        return self.node.shape[0], self.node.shape[1]


def pack(tokens: Tensor, lengths: Tensor) -> Packing:
    """tokens int64 [B,T], lengths int64 [B] (at least 1) -> Packing. T may shrink to the longest row.

    Nodes are numbered row by row in the lexicographic order of the rows, so that they depend on contents alone.
    """
    device = tokens.device
    longest = int(lengths.max())
    grid = tokens[:, :longest].cpu().numpy()
    counts = lengths.cpu().numpy()
    real = np.arange(longest) < counts[:, None]  # [B,T]
    grid = np.where(real, grid, -1)
    order = np.lexsort(grid.T[::-1])
    sorted_rows, sorted_real = grid[order], real[order]
    shared = np.zeros_like(sorted_real)  # the row before has the same prefix up to here
    shared[1:] = np.logical_and.accumulate(sorted_rows[1:] == sorted_rows[:-1], axis=1)
    new = sorted_real & ~shared
    number = (np.cumsum(new) - 1).reshape(new.shape)
    # Numbers grow from row to row, so the latest new node above a shared place is the one it shares.
    node = np.maximum.accumulate(np.where(new, number, -1), axis=0)
    node = np.where(sorted_real, node, 0)
    places = np.empty_like(node)
    places[order] = node
    first = np.zeros_like(new)
    first[order] = new
    flat_places = np.flatnonzero(first)
    owner = np.empty(len(flat_places), dtype=np.int64)
    owner[places.reshape(-1)[flat_places]] = flat_places
    holders = np.argsort(places.reshape(-1), kind="stable")
    starts = np.searchsorted(places.reshape(-1)[holders], np.arange(len(owner) + 1))
    plain = len(owner) == grid.size and bool((owner == np.arange(grid.size)).all())
    return Packing(
        tokens=torch.from_numpy(grid.reshape(-1)[owner]).to(device),
        positions=torch.from_numpy(owner % longest).to(device),
        node=torch.from_numpy(places).to(device),
        owner=torch.from_numpy(owner).to(device),
        holders=torch.from_numpy(holders).to(device),
        starts=torch.from_numpy(starts).to(device),
        plain=plain,
    )
