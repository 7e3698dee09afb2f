"""Tasks of your own for the verifiers library, version 1 of its interface. `verifiers_smoke.yaml` trains on them."""

from verifiers import v1


class Sum(v1.TaskData):
    answer: str


class SumTask(v1.Task[Sum]):
    @v1.reward(weight=1.0)
    async def correct(self, trace: v1.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @v1.reward(weight=0.1)
    async def number(self, trace: v1.Trace) -> float:
        return float(trace.last_reply.isdecimal())

    @v1.metric
    async def characters(self, trace: v1.Trace) -> float:
        return float(len(trace.last_reply))


class Sums(v1.Taskset[SumTask]):
    def __init__(self, highest: int) -> None:
        super().__init__(v1.TasksetConfig())
        self._highest = highest

    def load(self):
        for first in range(self._highest + 1):
            for second in range(self._highest + 1):
                yield SumTask(Sum(prompt=f"{first}+{second}=", answer=str(first + second)))


def load(highest: int = 9) -> Sums:
    """What the recipe's `path` names, called with its `settings`."""
    return Sums(highest)
