"""The process in which a user's tools are called. `python -m mrlm_cli.envs.tool_worker`, over the pipes of `worker.py`:

    {"op": "init", "folders": [...], "functions": [...]}  -> {}
    {"op": "call", "tool": name, "arguments": {...}}      -> {"answer": text}
                                                          or {"refused": text}, where it raised a ToolError
                                                          or {"broken": text, "trace": …}, where it raised anything else

or {"failure": text} where it raised a SessionFailure. It dies with the process that started it, and with it whatever a
function has started in its process group, even while a function holds the interpreter's lock: a guard, a process of the
same group, sees to that.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrlm_cli.envs.tool_schema import MOST_ANSWER, MOST_SAID, Tool, ToolError
from mrlm_cli.envs.troubles import trace
from mrlm_cli.envs.worker import serve
from mrlm_cli.errors import SessionFailure
from mrlm_cli.registry import function


class Calls:
    """The functions of this process."""

    def __init__(self) -> None:
        self._tools: dict[str, Tool] = {}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a request leads to. Raises SessionFailure if a function does, and whatever importing one raises."""
        if request["op"] == "init":
            sys.path[:0] = [folder for folder in request["folders"] if folder not in sys.path]
            tools = [Tool.of(function(name, [Path(folder) for folder in sys.path])) for name in request["functions"]]
            self._tools = {tool.name: tool for tool in tools}
            return {}
        name = request["tool"]
        try:
            return {"answer": self._tools[name].call(request["arguments"])[: MOST_ANSWER + 1]}
        except ToolError as error:
            return {"refused": str(error)[:MOST_ANSWER]}
        except SessionFailure:
            raise
        except BaseException as error:  # a border: a user's function may raise anything, SystemExit included
            return {"broken": f"{name} failed: {type(error).__name__}: {error}"[:MOST_SAID], "trace": trace(error)}


def _guard() -> None:
    """Fork a process that ends this group once nobody can send requests any more."""
    if os.fork() == 0:
        os.closerange(1, 3)  # the parent must see the worker's own end by them
        requests = select.poll()
        requests.register(0, 0)
        requests.poll()
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _guard()  # before any thread
    serve(Calls().answer)
