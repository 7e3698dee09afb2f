"""An environment of your own: copy a letter a given number of times, `c3=` is answered by `ccc` and the end token.

Copy this file beside your recipe, change it, and name it there: `type: ./my_env.py:MyEnvironment`. Test it with
`mrlm_cli.envs.conformance.problems`. It runs in worker processes; what it prints appears on the terminal.
"""

from typing import Annotated, ClassVar

from pydantic import Field

from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.single import SingleReply
from mrlm_cli.records import Task
from mrlm_cli.strict import EnvironmentSettings

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class MyEnvironment(Environment):
    """Repeat a letter. A letter with its count is in one split: of five neighbouring pairs three are trained on."""

    class Config(EnvironmentSettings):
        """Settings of the recipe's `environments` entry."""

        longest: Annotated[int, Field(ge=1, le=9)] = 5
        """Largest count."""

    components: ClassVar[dict[str, float]] = {"match": 1.0, "exact": 0.0}  # name -> weight in the training reward

    def _pairs(self, split):
        pairs = [(letter, count) for letter in LETTERS for count in range(1, self.config.longest + 1)]
        places = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}[split]
        return [pair for i, pair in enumerate(pairs) if (i + i // self.config.longest) % 5 in places]

    def size(self, split):
        return len(self._pairs(split))

    def task(self, split, index):
        letter, count = self._pairs(split)[index]
        return Task(f"{split}/{index}", self.config.label, split, index, {"letter": letter, "count": count})

    def open(self, task, seed):
        return SingleReply(f"{task.data['letter']}{task.data['count']}=", lambda reply: (self.score(task, reply), {}))

    def score(self, task, reply):
        wanted, given = list(self.oracle(task)), list(reply.message.content)
        wanted, given = [*wanted, "end"], [*given, "end"] if reply.stop == "end" else given
        right = sum(a == b for a, b in zip(wanted, given, strict=False))
        return {"match": right / max(len(wanted), len(given)), "exact": float(wanted == given)}

    def oracle(self, task):
        return task.data["letter"] * task.data["count"]
