"""Which shapes occur: close to what is asked for, or few, so that each can be captured once."""

from __future__ import annotations

from dataclasses import dataclass

WIDTH_STEP = 32  # attention widths and capacities are multiples of it, so that memory and shapes change seldom
COARSE_STEP = 128  # where shapes are to be few
COARSE_SHARE = 8  # and beyond COARSE_SHARE coarse steps, this part of the next power of two


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rounds lengths and rows up."""

    few: bool

    def width(self, length: int) -> int:
        """The attention width, or capacity of a slot, for so many positions: never less, and never falling."""
        step = WIDTH_STEP if not self.few else max(COARSE_STEP, _power_of_two(length) // COARSE_SHARE)
        return -(-length // step) * step

    def rows(self, count: int, most: int) -> int:
        """The rows of a step that decodes `count` <= `most`: as many, or the next power of two up to `most`."""
        return min(_power_of_two(count), most) if self.few else count

    def memory(self, asked: tuple[int, int], there: tuple[int, int] | None, most: int) -> tuple[int, int]:
        """Slots and capacity of the cache: as asked.

        Where shapes are few, neither shrinks from what is `there`, so that it seldom moves, unless both together came
        to more than `most` positions.
        """
        if not self.few or there is None:
            return asked
        slots, capacity = max(asked[0], there[0]), max(asked[1], there[1])
        return (slots, capacity) if slots * capacity <= most else asked


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
