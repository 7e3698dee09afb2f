"""Tools: answer a question that only a tool can answer."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mrlm_cli.envs import math_answers, tool_calls
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.code import chosen_sandbox
from mrlm_cli.envs.sandbox.settings import SandboxSettings
from mrlm_cli.envs.tool_box import Box, require_search
from mrlm_cli.envs.tool_schema import ToolError
from mrlm_cli.envs.tool_tasks import NEEDED, Kind, ToolTask, generated
from mrlm_cli.records import Message, Reply, Split, Task, Turn
from mrlm_cli.strict import EnvironmentSettings

ToolName = Literal["calculator", "python", "search", "notes", "files"]
_ASK = "Give the final answer between <answer> and </answer>."


class Tools(Environment):
    """A question whose answer lies behind a tool: a long product, a program's output, a document, a note, a file.

    A reply without a tool call is the final answer. Components: `correct`, 1 if it is right; `format`, 1 if it stands
    between the tags, the reply ended by itself and no call before it was wrong; `exact`, 1 for a right answer between
    the tags. Wrong calls (no JSON, unknown tools, arguments that do not fit, what a tool refuses) are answered with
    what is wrong. Facts: `calls`, `wrong_calls`.

    With `style: template` the tools' schemas go to the model's chat template, and calls are read in the form that
    Hermes, Qwen, Mistral and Llama 3 templates teach; with `tagged` the prompt explains a form that any model can
    write. There is no end to tasks; what the tools hold is new in every task, so that nothing can be learnt by heart.
    The tool python needs a sandbox (raises UserError without), the tool search the extra `search` (MissingExtra).
    """

    class Config(EnvironmentSettings):
        """Which tasks, which tools, and how calls are written."""

        kinds: Annotated[tuple[Kind, ...], Field(strict=False, min_length=1)] = ("calculate", "notes", "files")
        """Kinds of tasks, each as likely as the others."""
        tools: Annotated[tuple[ToolName, ...], Field(strict=False)] = ()
        """Tools to offer besides those that the kinds need."""
        style: Literal["tagged", "template"] = "tagged"
        """Calls as the prompt explains them, or as the model's own chat template does."""
        calls: Annotated[int, Field(ge=1, le=100)] = 3
        """Replies with calls, right or wrong; sampling.max_turns must be above it."""
        sandbox: SandboxSettings = SandboxSettings()
        """Bounds of a program given to the tool python; all of one reply share the wall time."""

        @model_validator(mode="after")
        def _fits(self) -> Tools.Config:
            for names in (self.kinds, self.tools):
                if len(set(names)) != len(names):
                    raise ValueError("kinds or tools names one of them twice")
            return self

        @property
        def offered(self) -> tuple[str, ...]:
            """The tools of every task, whichever kind it is: otherwise they would tell the kind."""
            return tuple(dict.fromkeys([NEEDED[kind] for kind in self.kinds] + list(self.tools)))

    components: ClassVar[dict[str, float]] = {"correct": 1.0, "format": 0.1, "exact": 0.0}
    audited: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if "search" in config.offered:
            require_search()
        self._sandbox = chosen_sandbox(config.sandbox.allow_unsafe) if "python" in config.offered else None

    @property
    def in_process(self) -> bool:
        """Not with the tool python, which takes time."""
        return self._sandbox is None

    def size(self, split: Split) -> None:
        """There is no end to tasks."""
        return

    def task(self, split: Split, index: int) -> Task:
        """Task number `index` of the split; what the tools hold is not in it. Raises ValueError below 0."""
        if index < 0:
            raise ValueError(f"{split} has no task {index}")
        made = self._made(split, index)
        return Task(
            f"{split}/{index}", self.config.label, split, index, {"question": made.question, "answer": made.answer}
        )

    def open(self, task: Task, seed: int) -> ToolSession:
        """Ask; nothing depends on the seed."""
        made = self._made(task.split, task.index)
        box = Box(
            self.config.offered,
            notes=made.notes,
            files=made.files,
            documents=made.documents or ("There is nothing here.",),
            sandbox=self._sandbox,
            limits=self.config.sandbox.limits(),
        )
        return ToolSession(made, box, self.config)

    def oracle(self, task: Task) -> list[str]:
        """The call that finds the answer, then the answer."""
        made = self._made(task.split, task.index)
        name, arguments = made.call
        call = json.dumps({"name": name, "arguments": arguments})
        return [f"{tool_calls.OPEN}{call}{tool_calls.CLOSE}", f"<answer>{made.answer}</answer>"]

    def _made(self, split: Split, index: int) -> ToolTask:
        return _generated(split, index, self.config.kinds)


class ToolSession:
    """Calls and their answers, until a reply makes no call or no call is left."""

    def __init__(self, task: ToolTask, box: Box, config: Tools.Config) -> None:
        self._task = task
        self._box = box
        self._config = config
        self._replies = self._calls = self._wrong = 0

    def start(self) -> Turn:
        """The question, with the tools as the style says."""
        schemas = tuple(tool.schema for tool in self._box.tools.values())
        asked = f"{self._task.question} Use tools in at most {self._config.calls} replies. {_ASK}"
        if self._config.style == "template":
            return Turn(messages=(Message("user", asked),), tools=schemas)
        listed = "\n".join(json.dumps(schema["function"]) for schema in schemas)
        text = (
            f"You have these tools:\n{listed}\nTo use one, answer with "
            f'{tool_calls.OPEN}{{"name": "…", "arguments": {{…}}}}{tool_calls.CLOSE} and nothing else.\n'
            f"{asked}"
        )
        return Turn(messages=(Message("user", text),))

    def step(self, reply: Reply) -> Turn:
        """Answer the calls, or judge the final answer."""
        self._replies += 1
        self._box.begin()
        try:
            found = tool_calls.calls(reply.message.content)
        except ToolError as error:
            self._calls += 1
            self._wrong += 1
            return self._said([("", f"error: {error}")], reply)
        if not found:
            return self._judged(reply)
        return self._said([(call.name, self._answer(call)) for call in found], reply)

    def close(self) -> None:
        """Remove what the tools kept."""
        self._box.close()

    def _answer(self, call: tool_calls.ToolCall) -> str:
        self._calls += 1
        try:
            return self._box.answer(call.name, call.arguments)
        except ToolError as error:
            self._wrong += 1
            return f"error: {error}"

    def _said(self, answers: list[tuple[str, str]], reply: Reply) -> Turn:
        if reply.stop == "length" or self._replies > self._config.calls:
            return self._done(correct=0.0, format=0.0, exact=0.0)
        plain = [(name, text.encode("utf-8", "replace").decode()) for name, text in answers]
        if self._config.style == "template":
            said = tuple(
                Message("tool", text, name=name if name in self._box.tools else None, tool_call_id=f"call{place:05}")
                for place, (name, text) in enumerate(plain)
            )
            return Turn(messages=said, tools=tuple(tool.schema for tool in self._box.tools.values()))
        text = "\n".join(f"<tool_result>{text}</tool_result>" for _, text in plain)
        return Turn(messages=(Message("user", text),))

    def _judged(self, reply: Reply) -> Turn:
        text = reply.message.content
        answer = math_answers.anywhere(text, "tagged")
        correct = answer is not None and math_answers.equal(self._task.answer, answer)
        tagged = reply.stop != "length" and math_answers.extract(text, "tagged") is not None
        return self._done(
            correct=float(correct), format=float(tagged and not self._wrong), exact=float(correct and tagged)
        )

    def _done(self, **components: float) -> Turn:
        facts = {"calls": float(self._calls), "wrong_calls": float(self._wrong)}
        return Turn(rewards={"policy": components}, done=True, facts=facts)


@lru_cache(maxsize=4096)
def _generated(split: Split, index: int, kinds: tuple[Kind, ...]) -> ToolTask:
    return generated(split, index, kinds)
