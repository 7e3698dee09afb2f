"""Sort digits: `sort 750862=` is answered by `025678` and the end token."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from functools import cache
from itertools import accumulate, combinations_with_replacement, zip_longest
from math import factorial, prod
from typing import Annotated, ClassVar

from pydantic import Field

from mrlm_cli.draws import permuted
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.single import SingleReply
from mrlm_cli.envs.splits import split_classes
from mrlm_cli.records import Reply, Split, Task
from mrlm_cli.strict import EnvironmentSettings

_END = "end"  # longer than one character, so it equals no character of a reply


class SortDigits(Environment):
    """Sort a string of digits in ascending order.

    Components: `match`, the share of positions that are right, the end included, over the longer of reply and answer;
    `exact`, 1 if all are. The end must be paid for, or the policy never learns to stop.

    Tasks are all 10**digits strings. A multiset of digits belongs to one split with all its permutations, so a
    held-out answer was never an answer in training. Of six digits 10 % of the 5005 multisets are validation tasks
    (about 100,000 strings), and another 10 % test tasks.
    """

    class Config(EnvironmentSettings):
        """How long the strings are."""

        digits: Annotated[int, Field(ge=2, le=12)] = 6
        """Digits to sort; six take a two-layer model about two minutes to learn."""

    components: ClassVar[dict[str, float]] = {"match": 1.0, "exact": 0.0}
    audited: ClassVar[bool] = True
    single_reply: ClassVar[bool] = True
    config: Config

    def size(self, split: Split) -> int:
        """Strings in the split."""
        return _strings(self.config.digits, split)[1][-1]

    def task(self, split: Split, index: int) -> Task:
        """String number `index` of the split, in a fixed mixed order. Raises ValueError outside range(size)."""
        classes, ends = _strings(self.config.digits, split)
        rank = permuted(index, ends[-1], "sort_digits", self.config.digits, split)
        place = bisect_right(ends, rank)
        digits = _arrangement(classes[place], rank - (ends[place - 1] if place else 0))
        data = {"digits": digits, "answer": "".join(sorted(digits))}
        return Task(f"{split}/{index}", self.config.label, split, index, data)

    def open(self, task: Task, seed: int) -> SingleReply:
        """Ask for the sorted digits; nothing depends on the seed."""
        return SingleReply(f"sort {task.data['digits']}=", lambda reply: (_rewards(task.data["answer"], reply), {}))

    def oracle(self, task: Task) -> str:
        """The right reply."""
        return str(task.data["answer"])

    def canonical(self, task: Task) -> str:
        """The multiset of digits."""
        return str(task.data["answer"])


def _rewards(answer: str, reply: Reply) -> Mapping[str, float]:
    wanted = [*answer, _END]
    given = [*reply.message.content] + ([_END] if reply.stop == "end" else [])
    right = sum(a == b for a, b in zip_longest(wanted, given))
    return {"match": right / max(len(wanted), len(given)), "exact": float(wanted == given)}


@cache
def _strings(digits: int, split: Split) -> tuple[list[str], list[int]]:
    """The split's multisets as sorted strings, and the running count of their arrangements."""
    classes, splits = _classes(digits)
    chosen = [classes[i] for i in splits[split]]
    return chosen, list(accumulate(_arrangements(multiset) for multiset in chosen))


@cache
def _classes(digits: int) -> tuple[list[str], dict[Split, list[int]]]:
    classes = ["".join(multiset) for multiset in combinations_with_replacement("0123456789", digits)]
    return classes, split_classes(classes)


def _arrangements(multiset: str) -> int:
    return factorial(len(multiset)) // prod(factorial(multiset.count(digit)) for digit in set(multiset))


def _arrangement(multiset: str, rank: int) -> str:
    """Arrangement number `rank` of a sorted string, in lexicographic order."""
    left = {digit: multiset.count(digit) for digit in sorted(set(multiset))}
    total = _arrangements(multiset)  # of what is left; a share left[digit] / length of them begins with the digit
    result = ""
    for length in range(len(multiset), 0, -1):
        for digit, count in left.items():
            beginning = total * count // length
            if rank < beginning:
                result, total = result + digit, beginning
                left[digit] -= 1
                break
            rank -= beginning
    return result
