"""A user's functions as tools. They are called in a process of their own, so that one that hangs, or ends its process,
costs its call and nothing else: the policy is told, and the next call finds a new process.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

from mrlm_cli.envs.process import START_SECONDS, DiedError, LateError, WorkerProcess
from mrlm_cli.envs.starting import starting
from mrlm_cli.envs.tool_schema import BrokenTool, LateTool, Tool, ToolError
from mrlm_cli.envs.troubles import Troubles
from mrlm_cli.envs.wire import frame
from mrlm_cli.errors import SessionFailure, UserError
from mrlm_cli.registry import function


class Functions:
    """The functions of `./file.py:name` or `package.module:name` as tools, in order, and the process that runs them.

    The process starts with the first call, and again with the next one after it was ended; no deadline counts that.
    Raises UserError for what cannot be a tool.
    """

    def __init__(self, names: Sequence[str], deadline: float) -> None:
        self._names = names
        self._process: WorkerProcess | None = None
        self._troubles = Troubles(lambda text: None)  # the worker process's own output reaches the person
        self.tools = []
        for name in names:
            try:
                self.tools.append(OwnTool(Tool.of(function(name)), self, deadline))
            except (TypeError, NameError) as error:  # a parameter without a type, or of a type that does not exist
                raise UserError(f"{name} cannot be a tool: {error}") from error

    def call(self, tool: str, arguments: Mapping[str, Any], seconds: float) -> str:
        """What the function says. Raises LateTool, BrokenTool, ToolError, and SessionFailure if it raises that."""
        try:
            request = frame({"op": "call", "tool": tool, "arguments": arguments})
        except ValueError as error:  # a number that is not finite, or has thousands of digits
            raise ToolError(f"{tool}: the arguments cannot be sent: {error}") from error
        try:
            answer = self._running().ask(request, seconds)
        except LateError:
            self.close()
            raise LateTool(tool) from None
        except DiedError as died:
            self.close()
            raise BrokenTool(f"{tool} failed: {died}") from died
        match answer:
            case {"answer": str(text)}:
                return text
            case {"refused": str(text)}:
                raise ToolError(text)
            case {"broken": str(text)}:
                raise BrokenTool(text)
        raise SessionFailure(answer["failure"])

    def close(self) -> None:
        """End the process, if there is one, at once."""
        if self._process is not None:
            self._process.kill()
        self._process = None

    def _running(self) -> WorkerProcess:
        """Raises MrlmError if the process cannot start: the functions were imported before, so it is the machine."""
        if self._process is None:
            with starting(START_SECONDS):  # the functions' module may take longer to import than any call takes
                process = WorkerProcess("tools", Event(), self._troubles, module="mrlm_cli.envs.tool_worker")
                try:
                    process.initialise([Path(folder) for folder in sys.path if folder], functions=list(self._names))
                except BaseException:
                    process.kill()
                    raise
                self._process = process
        return self._process


class OwnTool:
    """One function; whatever it raises is told to the policy, and costs nothing else."""

    def __init__(self, tool: Tool, functions: Functions, deadline: float) -> None:
        self.name = tool.name
        self.schema = tool.schema
        self.deadline = deadline
        self._tool = tool
        self._functions = functions

    def call(self, arguments: Any, seconds: float) -> str:
        """The answer. Raises ToolError for what the function says with it, BrokenTool for all else that it raises."""
        self._tool.check(arguments)
        return self._functions.call(self.name, arguments, seconds)
