"""Tools: answer a question that only a tool can answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mrlm_cli.envs import math_answers, tool_calls
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.code import chosen_sandbox
from mrlm_cli.envs.sandbox.settings import SandboxSettings
from mrlm_cli.envs.tool_box import Box, names_of, require_search
from mrlm_cli.envs.tool_files import read
from mrlm_cli.envs.tool_functions import Functions
from mrlm_cli.envs.tool_schema import MOST_ANSWER, BrokenTool, LateTool, ToolError
from mrlm_cli.envs.tool_servers import ServerSettings, ToolServers, close, require_mcp
from mrlm_cli.envs.tool_tasks import NEEDED, Kind, ToolTask, generated
from mrlm_cli.errors import UserError
from mrlm_cli.records import Message, Reply, Split, Task, Turn
from mrlm_cli.strict import EnvironmentSettings, Names, Strings

ToolName = Literal["calculator", "python", "search", "notes", "files"]
_ASK = "Give the final answer between <answer> and </answer>."
_HOLE = re.compile(r"\{(?:tools|question|instruction)\}")
_WITHHELD = "(withheld)"


class Tools(Environment):
    """A question whose answer lies behind a tool: a long product, a program's output, a document, a note, a file.

    A reply without a tool call is the final answer. Components: `correct`, 1 if it is right; `format`, 1 if it stands
    between the tags, the reply ended by itself and no call before it was wrong; `exact`, 1 for a right answer between
    the tags. Wrong calls (no JSON, unknown tools, arguments that do not fit, what a tool refuses) are answered with
    what is wrong, and so is one that takes too long: a policy that brings about failures would leave its sessions out
    of the training. Facts: `calls`, `wrong_calls`, and with tools of yours among these `late_calls`, which took longer
    than `deadline`, and `broken_calls`, in which a function raised something other than a ToolError or a server ended.

    With `style: template` the tools' schemas go to the model's chat template, and calls are read in the form that
    Hermes, Qwen, Mistral and Llama 3 templates teach; with `tagged` the prompt explains a form that any model can
    write. There is no end to generated tasks; what the tools hold is new in every one, so that nothing can be learnt by
    heart. Tasks of your own are read from `path`; a tenth of them each becomes validation and test, by a hash of the
    question. `functions` are tools of your own: typed Python functions, called in a process of their own, which is
    started anew after a call that is late or ends it. `mcp` names servers (see `tool_servers`). An answer is right if
    it is the same number, or else the same text without blanks.

    The tool python needs a sandbox (raises UserError without), the tool search the extra `search` (MissingExtra).
    """

    class Config(EnvironmentSettings):
        """Which tasks, which tools, and how calls are written."""

        kinds: Annotated[tuple[Kind, ...], Field(strict=False, min_length=1)] = ("calculate", "notes", "files")
        """Kinds of generated tasks, each as likely as the others; not used with a file."""
        tools: Annotated[tuple[ToolName, ...], Field(strict=False)] = ()
        """Built-in tools to offer besides those that the kinds need."""
        path: Annotated[str | None, Names("file")] = None
        """A file of tasks instead of kinds, JSON lines or .parquet (extra `parquet`): rows with `question`, `answer`,
        and perhaps `tools`, the names of those to offer for it (by default all)."""
        functions: Annotated[Strings, Names("function")] = ()
        """Tools of your own: ./my_tools.py:name beside the recipe or in the working directory, or
        package.module:name. The name, the types and the docstring are what the policy is told."""
        deadline: Annotated[float, Field(gt=0, le=3600)] = 10.0
        """Seconds for one call of one of the functions, not counting the start of their process. All calls of a reply
        together, whatever they call, have the longest time that one of its tools may take. It must be below
        hardware.deadline."""
        mcp: Annotated[tuple[ServerSettings, ...], Field(strict=False)] = ()
        """MCP servers (extra `mcp`), whose tools are offered as well: [{command: [python, ./my_server.py]}]."""
        style: Literal["tagged", "template"] = "tagged"
        """Calls as the prompt explains them, or as the model's own chat template does."""
        prompt: Annotated[str, Field(min_length=1, max_length=10_000)] = "{tools}{question} {instruction}"
        """The first message: `{tools}` stands for the list of tools and how they are called (empty with style
        template), `{question}` for the question, `{instruction}` for the limit of calls and the form of the answer."""
        withheld: bool = False
        """Keep back what the tools say, as a control: calls are made and checked, and answered with `(withheld)`."""
        calls: Annotated[int, Field(ge=1, le=100)] = 3
        """Replies with calls, right or wrong; sampling.max_turns must be above it."""
        sandbox: SandboxSettings = SandboxSettings()
        """Bounds of a program given to the tool python; all of one reply share the wall time."""

        @model_validator(mode="after")
        def _fits(self) -> Tools.Config:
            for names in (self.kinds, self.tools, self.functions):
                if len(set(names)) != len(names):
                    raise ValueError("kinds, tools or functions names one of them twice")
            for name in self.functions:
                if ":" not in name:
                    raise ValueError(f"functions: expected ./file.py:name or package.module:name, got {name!r:.80}")
            if "{question}" not in self.prompt:
                raise ValueError("prompt must contain {question}")
            if self.path is not None and not (self.tools or self.functions or self.mcp):
                raise ValueError("path brings tasks alone; say with tools, functions or mcp what solves them")
            return self

        @property
        def offered(self) -> tuple[str, ...]:
            """The built-in tools of every task, whichever kind it is: otherwise they would tell the kind."""
            kinds = self.kinds if self.path is None else ()
            return tuple(dict.fromkeys([NEEDED[kind] for kind in kinds] + list(self.tools)))

        @property
        def needed_extras(self) -> tuple[str, ...]:
            """See Strict."""
            return ("search",) if "search" in self.offered else ()

    components: ClassVar[dict[str, float]] = {"correct": 1.0, "format": 0.1, "exact": 0.0}
    audited: ClassVar[bool] = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if "search" in config.offered:
            require_search()
        self._sandbox = chosen_sandbox(config.sandbox.allow_unsafe) if "python" in config.offered else None
        if config.mcp:
            require_mcp()
        self._servers = ToolServers(config.mcp)
        self._functions = Functions(config.functions, config.deadline)
        self._names = [*names_of(config.offered), *(tool.name for tool in self._functions.tools)]
        if twice := sorted({name for name in self._names if self._names.count(name) > 1}):
            raise UserError(f"two tools are called {twice[0]!r}; rename the function")

    @property
    def in_process(self) -> bool:
        """Not with the tool python, which takes time, nor with tools that nobody audited."""
        return self._sandbox is None and not self.config.functions and not self.config.mcp

    @property
    def journalled(self) -> bool:
        """What runs elsewhere has a deadline, and may answer the same call differently."""
        return not self.in_process

    def size(self, split: Split) -> int | None:
        """Tasks of a file; there is no end to generated ones. Raises UserError for a broken file."""
        return None if self.config.path is None else len(self._read(self.config.path)[split])

    def task(self, split: Split, index: int) -> Task:
        """Task number `index` of the split; what the tools hold is not in it. Raises ValueError outside the split."""
        size = self.size(split)
        if index < 0 or (size is not None and index >= size):
            raise ValueError(f"{split} has no task {index}")
        made = self._made(split, index)
        return Task(
            f"{split}/{index}", self.config.label, split, index, {"question": made.question, "answer": made.answer}
        )

    def open(self, task: Task, seed: int) -> ToolSession:
        """Ask; nothing depends on the seed."""
        made = self._made(task.split, task.index)
        served, own = self._servers.open()
        try:
            box = Box(
                self.config.offered,
                notes=made.notes,
                files=made.files,
                documents=made.documents or ("There is nothing here.",),
                sandbox=self._sandbox,
                limits=self.config.sandbox.limits(),
                others=(*self._functions.tools, *served),
                only=made.offered,
            )
        except BaseException:
            close(own)
            raise
        return ToolSession(made, box, self.config, lambda: close(own))

    def oracle(self, task: Task) -> list[str]:
        """The call that finds the answer, where it is known, then the answer."""
        made = self._made(task.split, task.index)
        answer = f"<answer>{made.answer}</answer>"
        if made.call is None:
            return [answer]
        name, arguments = made.call
        call = json.dumps({"name": name, "arguments": arguments})
        return [f"{tool_calls.OPEN}{call}{tool_calls.CLOSE}", answer]

    def close(self) -> None:
        """Remove what killed workers' sandboxes left, and end the functions' process and the servers of this one."""
        if self._sandbox is not None:
            self._sandbox.mechanism.sweep()
        self._functions.close()
        self._servers.close()

    @classmethod
    def replies(cls, config: Any, agent: str) -> tuple[str, int]:
        """The replies with calls, and the answer."""
        return "calls", config.calls + 1

    def _made(self, split: Split, index: int) -> ToolTask:
        if self.config.path is None:
            return _generated(split, index, self.config.kinds)
        return self._read(self.config.path)[split][index]

    def _read(self, path: str) -> Mapping[Split, tuple[ToolTask, ...]]:
        return read(path, None if self.config.mcp else tuple(self._names))


class ToolSession:
    """Calls and their answers, until a reply makes no call or no call is left."""

    def __init__(self, task: ToolTask, box: Box, config: Tools.Config, end: Callable[[], None]) -> None:
        self._task = task
        self._box = box
        self._config = config
        self._end = end
        self._replies = self._calls = self._wrong = self._late = self._broken = 0

    def start(self) -> Turn:
        """The question, with the tools as the style says."""
        schemas = tuple(tool.schema for tool in self._box.tools.values())
        listed = ""
        if self._config.style == "tagged":
            lines = "\n".join(json.dumps(schema["function"]) for schema in schemas)
            listed = (
                f"You have these tools:\n{lines}\nTo use one, answer with "
                f'{tool_calls.OPEN}{{"name": "…", "arguments": {{…}}}}{tool_calls.CLOSE} and nothing else.\n'
            )
        told = {
            "{tools}": listed,
            "{question}": self._task.question,
            "{instruction}": f"Use tools in at most {self._config.calls} replies. {_ASK}",
        }
        text = _HOLE.sub(lambda found: told[found[0]], self._config.prompt)  # at once: a question may spell a hole
        return Turn(messages=(Message("user", text),), tools=schemas if self._config.style == "template" else ())

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
        """Remove what the tools kept, and end the session's own servers."""
        self._box.close()
        self._end()

    def _answer(self, call: tool_calls.ToolCall) -> str:
        self._calls += 1
        try:
            answer = self._box.answer(call.name, call.arguments)
        except ToolError as error:
            self._wrong += 1
            self._late += isinstance(error, LateTool)
            self._broken += isinstance(error, BrokenTool)
            return f"error: {str(error)[:MOST_ANSWER]}"
        return _WITHHELD if self._config.withheld else answer

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
        if self._config.functions or self._config.mcp:
            facts |= {"late_calls": float(self._late), "broken_calls": float(self._broken)}
        return Turn(rewards={"policy": components}, done=True, facts=facts)


@lru_cache(maxsize=4096)
def _generated(split: Split, index: int, kinds: tuple[Kind, ...]) -> ToolTask:
    return generated(split, index, kinds)
