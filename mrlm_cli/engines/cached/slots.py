"""Which conversation lies in which slot. Rows that decode are always the first slots, without holes."""

from __future__ import annotations

from collections.abc import Sequence

from mrlm_cli.engines.drafts import Draft


class Conversation:
    """All tokens of one conversation, and the slot that holds keys and values of its first `fed` tokens.

    The last sampled token is not fed until the conversation goes on.
    """

    __slots__ = ("draft", "fed", "name", "slot", "tokens")

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokens: tuple[int, ...] = ()  # prompts and replies so far, without the running draft
        self.slot: int | None = None
        self.fed = 0
        self.draft: Draft | None = None

    @property
    def ended(self) -> bool:
        """Whether its reply is complete."""
        return self.draft is None or self.draft.stop is not None


Layout = list[Conversation | None]


def arranged(
    layout: Sequence[Conversation | None], live: Sequence[Conversation], joining: Sequence[Conversation]
) -> tuple[Layout, list[Conversation]]:
    """Where everything lies next: (a layout as long as the old one, the rows that decode in slot order).

    Of `live` (slots 0 to len(live) - 1) those that go on close ranks, the last filling the first hole; `joining` follow
    in order. A conversation that is in the way moves to a free slot, or falls out if there is none.
    """
    new = list(layout)
    going = [row for row in live if not row.ended]
    holes = [slot for slot, row in enumerate(live) if row.ended and slot < len(going)]
    movers = [slot for slot, row in enumerate(live) if not row.ended and slot >= len(going)]
    for hole, mover in zip(holes, reversed(movers), strict=True):
        new[hole], new[mover] = new[mover], new[hole]

    first, end = len(going), len(going) + len(joining)
    place = {id(row): slot for slot, row in enumerate(new) if row is not None}
    free = [slot for slot in range(len(new) - 1, end - 1, -1) if new[slot] is None]
    for slot, row in zip(range(first, end), joining, strict=True):
        there = new[slot]
        if there is row:
            continue
        old = place.pop(id(row), None)
        new[slot] = row
        if old is not None:
            new[old] = None
        if there is not None:
            elsewhere = old if old is not None else free.pop() if free else None
            if elsewhere is None:
                place.pop(id(there))
            else:
                new[elsewhere], place[id(there)] = there, elsewhere
    return new, [row for row in new[:end] if row is not None]
