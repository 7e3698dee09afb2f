"""An environment of your own: put letters in order, `dbca=` is answered by `abcd` and the end token.

Copy this file beside your recipe, change it, and name it there: `type: ./my_env.py:MyEnvironment`. Test it with
`mrlm_cli.envs.conformance.problems`. It runs in worker processes; what it prints appears on the terminal.
"""

from itertools import product
from typing import Annotated, ClassVar

from pydantic import Field

from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.single import SingleReply
from mrlm_cli.envs.splits import split_classes
from mrlm_cli.records import Task
from mrlm_cli.strict import EnvironmentSettings


class MyEnvironment(Environment):
    """Order letters from a to f. Words of the same letters are in the same split."""

    class Config(EnvironmentSettings):
        """What a recipe may set beside type, name, weight and rewards."""

        letters: Annotated[int, Field(ge=2, le=5)] = 4
        """Letters of a word."""

    components: ClassVar[dict[str, float]] = {"match": 1.0, "exact": 0.0}  # weights in the training reward

    def __init__(self, config):
        super().__init__(config)
        words = ["".join(letters) for letters in product("abcdef", repeat=config.letters)]
        answers = sorted({"".join(sorted(word)) for word in words})
        split_of = {answers[i]: split for split, chosen in split_classes(answers).items() for i in chosen}
        self.words = {split: [] for split in split_of.values()}
        for word in words:
            self.words[split_of["".join(sorted(word))]].append(word)

    def size(self, split):
        return len(self.words[split])

    def task(self, split, index):
        return Task(f"{split}/{index}", self.config.label, split, index, {"word": self.words[split][index]})

    def open(self, task, seed):
        return SingleReply(task.data["word"] + "=", lambda reply: (self.score(task, reply), {}))

    def score(self, task, reply):
        wanted = [*self.oracle(task), "end"]
        given = [*reply.message.content] + ["end"] * (reply.stop == "end")
        right = sum(a == b for a, b in zip(wanted, given, strict=False))
        return {"match": right / max(len(wanted), len(given)), "exact": float(wanted == given)}

    def oracle(self, task):
        return "".join(sorted(task.data["word"]))
