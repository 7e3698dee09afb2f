"""Verifiers: tasks written for version 1 of that library's interface, scored by their own rewards and metrics."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Mapping
from functools import cached_property
from itertools import islice
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.global_random import OwnRandom
from mrlm_cli.envs.splits import split_classes
from mrlm_cli.errors import MissingExtra, SessionFailure, UserError
from mrlm_cli.records import Message, Reply, Split, Task, Turn
from mrlm_cli.registry import function
from mrlm_cli.strict import EnvironmentSettings, Names, Strings

OWN = ("reward", "exact")  # components that are there without `scores`


class Verifiers(Environment):
    """Tasks of a `verifiers.v1` taskset (verifiers 0.4.0, extra `verifiers`): one prompt, one reply, its own scoring.

    Components: `reward`, their rewards, each times their weight, added up; `exact`, 1 where that is `success_reward`
    or more; and each of `scores`, one of their rewards (without its weight) or metrics by name, with weight 0 unless
    `rewards` gives it one. What else they record becomes facts, and so metrics.

    Splits: tasks of the same prompt stay together; a tenth of the prompts, chosen by a hash, validates and a tenth
    tests. The taskset is loaded once in the trainer and once in each worker process, and must be the same there; the
    global generators are set to a fixed state for it.

    Refused, with the reason, for nothing here would serve them: tasks that need a container or prepare and finish in
    one, tools, judges (the recipe's reward `judge` journals what it hears), rewards that ask for a runtime, pictures.
    Scoring must not take part in what clocks or networks decide, or a resume is not exact.
    """

    class Config(EnvironmentSettings):
        """Which tasks."""

        path: Annotated[str, Field(pattern=":"), Names("function")]
        """./my_tasks.py:load beside the recipe, or package.module:load, which gives a Taskset (or tasks in order)."""
        settings: dict[str, Any] = Field(default_factory=dict)
        """Parameters with which it is called."""
        limit: Annotated[int, Field(ge=3, le=10_000_000)] = 10_000
        """Most tasks that are read, for some tasksets have no end."""
        scores: Strings = ()
        """Names of their rewards and metrics that become components of their own."""
        success_reward: float = 1.0
        """A reply is exactly right if the weighted sum of their rewards is this or more."""

        @model_validator(mode="after")
        def _fits(self) -> Verifiers.Config:
            for name in self.scores:
                if name in OWN:
                    raise ValueError(f"scores names {name}, which is a component already")
            return self

        @property
        def needed_extras(self) -> tuple[str, ...]:
            """See Strict."""
            return ("verifiers",)

    components: ClassVar[dict[str, float]] = {"reward": 1.0, "exact": 0.0}
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if importlib.util.find_spec("verifiers") is None:
            raise MissingExtra("the environment verifiers", "verifiers")

    @classmethod
    def declared(cls, config: Any) -> Mapping[str, float]:
        """`reward`, `exact` and the scores that the recipe names."""
        return {**cls.components, **dict.fromkeys(config.scores, 0.0)}

    def size(self, split: Split) -> int:
        """Tasks in the split. Raises UserError for a taskset that cannot be loaded or served."""
        return len(self._splits[split])

    def task(self, split: Split, index: int) -> Task:
        """Task number `index` of the split. Raises ValueError outside range(size)."""
        if not 0 <= index < self.size(split):
            raise ValueError(f"{split} has no task {index}")
        place = self._splits[split][index]
        data = {"place": place, "hash": self._tasks[place].hash, "prompt": _canonical(self._tasks[place])}
        return Task(f"{split}/{index}", self.config.label, split, index, data)

    def open(self, task: Task, seed: int) -> VerifiersSession:
        """Ask; the global generators that scoring may use follow the seed. Raises SessionFailure if the taskset is not
        what it was when the task was made."""
        place = task.data["place"]
        if place >= len(self._tasks) or self._tasks[place].hash != task.data["hash"]:
            raise SessionFailure(f"{self.config.path} gives another task number {place} in this process")
        return VerifiersSession(self._tasks[place], self.config, seed)

    def canonical(self, task: Task) -> str:
        """What is asked."""
        return str(task.data["prompt"])

    @cached_property
    def _tasks(self) -> list[Any]:
        from verifiers import v1

        with OwnRandom(0):
            try:
                tasks = list(islice(function(self.config.path)(**self.config.settings), self.config.limit))
            except TypeError as error:
                raise UserError(f"{self.config.path} gives no tasks: {error}") from error
        for place, task in enumerate(tasks):
            if not isinstance(task, v1.Task):
                raise UserError(f"{self.config.path} gives a {type(task).__name__}, not a verifiers.v1.Task")
            if reason := _unusable(task):
                raise UserError(f"task {place} of {self.config.path} cannot be used here: {reason}")
        return tasks

    @cached_property
    def _splits(self) -> dict[Split, list[int]]:
        members: dict[str, list[int]] = {}
        for place, task in enumerate(self._tasks):
            members.setdefault(_canonical(task), []).append(place)
        classes = list(members)
        if len(classes) < 3:
            raise UserError(f"{self.config.path} asks {len(classes)} different things; three splits need at least 3")
        return {
            split: sorted(place for number in numbers for place in members[classes[number]])
            for split, numbers in split_classes(classes).items()
        }


class VerifiersSession:
    """One question, one reply."""

    def __init__(self, task: Any, config: Verifiers.Config, seed: int) -> None:
        self._task = task
        self._config = config
        self._chance = OwnRandom(seed)

    def start(self) -> Turn:
        """The system prompt, if there is one, and the prompt."""
        return Turn(tuple(Message(role, text) for role, text in _prompt(self._task)))

    def step(self, reply: Reply) -> Turn:
        """What their rewards and metrics say. Raises SessionFailure for a score that they did not give."""
        trace = _trace(self._task, reply)
        with self._chance:
            asyncio.run(self._task.score(trace, None))
        found: dict[str, Any] = {name: reward and reward.score for name, reward in trace.rewards.items()}
        found |= trace.metrics
        missing = [name for name in (*self._config.scores, *found) if found.get(name) is None]
        if missing:
            raise SessionFailure(f"the task gave no score {missing[0]!r}; it gave {', '.join(found) or 'none'}")
        exact = float(trace.reward >= self._config.success_reward)
        named = {name: float(found[name]) for name in self._config.scores}
        return Turn(
            rewards={"policy": {"reward": trace.reward, "exact": exact, **named}},
            facts={name: float(value) for name, value in found.items() if name not in named},
            done=True,
        )

    def close(self) -> None:
        """Nothing is held."""


def _prompt(task: Any) -> list[tuple[str, str]]:
    """(role, text) of every message before the reply."""
    prompt = task.data.prompt
    messages = [("user", prompt)] if isinstance(prompt, str) else [(each.role, each.content or "") for each in prompt]
    return [("system", task.data.system_prompt), *messages] if task.data.system_prompt else messages


def _canonical(task: Any) -> str:
    return hashlib.blake2b(json.dumps(_prompt(task)).encode(), digest_size=16).hexdigest()


def _unusable(task: Any) -> str | None:
    """Why a task cannot be served by one prompt, one reply and its scoring."""
    from verifiers import v1

    kind, data = type(task), task.data
    if not data.prompt:
        return "it has no prompt"
    if not isinstance(data.prompt, str):
        if any(each.role not in ("system", "user", "assistant") for each in data.prompt):
            return "its prompt holds the results of tools"
        if any(not isinstance(each.content, str) or getattr(each, "tool_calls", None) for each in data.prompt):
            return "its prompt holds more than text"
    if kind.NEEDS_CONTAINER or data.image is not None or data.artifacts:
        return "it needs a container"
    if any(getattr(kind, name) is not getattr(v1.Task, name) for name in ("setup", "finalize", "stage_verifier")):
        return "it prepares or finishes in a runtime"
    if kind.toolsets(task.config):
        return "it has tools"
    if task.config.judges:
        return "it asks judges"
    for hook in (*task.hooks("reward"), *task.hooks("metric")):
        parameter = inspect.signature(hook).parameters.get("runtime")
        if parameter is not None and parameter.default is inspect.Parameter.empty:
            return f"{hook.__name__} asks for a runtime"
    if not task.hooks("reward"):
        return "it has no reward"
    return None


def _trace(task: Any, reply: Reply) -> Any:
    """A finished conversation, as the library records it."""
    from verifiers import v1
    from verifiers.v1.graph import MessageNode
    from verifiers.v1.trace import AgentInfo, ModelCall, TraceTask

    kinds = {"system": v1.SystemMessage, "user": v1.UserMessage, "assistant": v1.AssistantMessage}
    said = [kinds[role](content=text) for role, text in _prompt(task)]
    said.append(v1.AssistantMessage(content=reply.message.content))
    nodes = [
        MessageNode(parent=number - 1 if number else None, message=message, sampled=number == len(said) - 1)
        for number, message in enumerate(said)
    ]
    return v1.Trace(
        task=TraceTask(type=type(task).__name__, data=task.data),
        agent=AgentInfo(config=v1.AgentConfig()),
        nodes=nodes,
        calls=[ModelCall(node=len(nodes) - 1, finish_reason="length" if reply.stop == "length" else "stop")],
        is_completed=True,
        ok=True,
        stop_condition="agent_completed",
    )
