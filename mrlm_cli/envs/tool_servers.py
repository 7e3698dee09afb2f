"""Tools of MCP servers (Model Context Protocol, over standard input and output), by the official client library.

A server is a program of the user's. It is started when it is first needed, once for each worker process or, if `fresh`,
for each session, and again after it died. What the client does runs in an event loop of its own thread. On Linux a
server dies with the worker process, however that ends; elsewhere it ends when it sees its standard input closed.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as LateError
from contextlib import suppress
from functools import cache
from threading import Thread
from typing import Annotated, Any

from pydantic import Field

from mrlm_cli.envs.starting import starting
from mrlm_cli.envs.tool_schema import MOST_SAID, BrokenTool, LateTool, ToolError
from mrlm_cli.errors import DeadlineExceeded, MissingExtra, SessionFailure
from mrlm_cli.strict import Names, Strict, Strings

START_SECONDS = 20.0  # for a server to start and to list its tools
CLOSE_SECONDS = 5.0  # for a server to end; then it is left to the end of the process
MOST_NESTED = 50  # lists and objects inside one another in the arguments of a call
# The parent's death kills the server (PR_SET_PDEATHSIG is 1), for it runs in a process group of its own.
_BOUND = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"


class ServerSettings(Strict):
    """One MCP server; the tools that it lists are offered beside the others."""

    command: Annotated[Strings, Field(min_length=1), Names("command")]
    """Program and arguments; it speaks MCP over standard input and output. A file is looked up beside the recipe."""
    variables: Strings = ()
    """Names of environment variables that it is given, besides PATH, HOME and the like."""
    deadline: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Seconds for one call, not counting the server's start; without an answer the policy is told so, and the server is
    started anew. It must be below hardware.deadline."""
    fresh: bool = False
    """Start a server for each session: for those that keep something between calls. It costs a start each time."""

    @property
    def label(self) -> str:
        """The server in words."""
        return " ".join(self.command)[:80]

    @property
    def needed_extras(self) -> tuple[str, ...]:
        """See Strict."""
        return ("mcp",)


def require_mcp() -> None:
    """Raises MissingExtra."""
    if importlib.util.find_spec("mcp") is None:
        raise MissingExtra("a tool server", "mcp")


class ToolServers:
    """The servers of one environment in this process."""

    def __init__(self, settings: Sequence[ServerSettings]) -> None:
        self._shared = [_Server(each) for each in settings if not each.fresh]
        self._fresh = [each for each in settings if each.fresh]

    def open(self) -> tuple[list[ServedTool], list[_Server]]:
        """(tools of all servers for one session, the servers that end with it). Raises SessionFailure."""
        own = [_Server(each) for each in self._fresh]
        try:
            return [tool for server in (*self._shared, *own) for tool in server.tools()], own
        except BaseException:  # whatever it was, no server is left behind
            close(own)
            raise

    def close(self) -> None:
        """End the shared servers."""
        close(self._shared)


def close(servers: Sequence[_Server]) -> None:
    """End the servers."""
    for server in servers:
        server.close()


class ServedTool:
    """One tool of a server, which judges the arguments itself."""

    def __init__(self, server: _Server, listed: Any) -> None:
        self.name: str = listed.name
        self.schema: Mapping[str, Any] = {
            "type": "function",
            "function": {
                "name": listed.name,
                "description": listed.description or "",
                "parameters": dict(listed.input_schema),
            },
        }
        self._server = server

    @property
    def deadline(self) -> float:
        """The server's."""
        return self._server.deadline

    def call(self, arguments: Any, seconds: float) -> str:
        """The server's answer. Raises ToolError for what the server calls an error, LateTool, and BrokenTool where the
        call ends the server or what it says breaks the protocol; SessionFailure where the server cannot start."""
        if not isinstance(arguments, Mapping):
            raise ToolError(f"{self.name}: arguments must be a JSON object")
        if reason := _unsendable(arguments):
            raise ToolError(f"{self.name}: {reason}")
        return self._server.call(self.name, dict(arguments), seconds)


class _Server:
    """A connection that is made when it is needed, and made again after the server died."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._session: _Session | None = None

    def tools(self) -> list[ServedTool]:
        """What the server lists."""
        return [ServedTool(self, listed) for listed in self._running().listed]

    @property
    def deadline(self) -> float:
        """Seconds for one call."""
        return self._settings.deadline

    def call(self, name: str, arguments: Mapping[str, Any], seconds: float) -> str:
        """The text of the tool's answer."""
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        session = self._running()
        try:
            result = _wait(session.client.call_tool(name, dict(arguments)), seconds)
        except LateError:
            self._abandon()
            raise LateTool(name) from None
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                self._abandon()
                raise BrokenTool(f"{name} failed: its server ended and is started anew") from error
            raise ToolError(f"{name}: {error}") from error
        except Exception as error:  # a border: whatever the library raises over a server that breaks the protocol
            self._abandon()
            raise BrokenTool(f"{name} failed: {type(error).__name__}: {error}"[:MOST_SAID]) from error
        text = "\n".join(_texts(result.content))
        if result.is_error:
            raise ToolError(text or f"{name} failed")
        return text or "(nothing was said)"

    def _abandon(self) -> None:
        """Let the server end while others go on: one that hangs takes seconds to be ended."""
        session, self._session = self._session, None
        if session is not None:
            asyncio.run_coroutine_threadsafe(session.close(), _loop())

    def close(self) -> None:
        """End the server, if there is one."""
        session, self._session = self._session, None
        if session is not None:
            with suppress(LateError):
                _wait(session.close(), CLOSE_SECONDS)

    def _running(self) -> _Session:
        if self._session is None or self._session.over:
            self._session = None
            session = _Session(self._settings)
            try:
                with starting(START_SECONDS):
                    _wait(session.begin(), START_SECONDS)
            except LateError:
                raise DeadlineExceeded(
                    f"tool server {self._settings.label}: not ready after {START_SECONDS:g} s"
                ) from None
            except Exception as error:  # a border: it may not be there, or speak something else
                text = f"{type(error).__name__}: {error}"
                raise SessionFailure(f"tool server {self._settings.label} cannot start: {text}") from error
            self._session = session
        return self._session


class _Session:
    """One life of a server, entered and left by one task, as the library asks."""

    def __init__(self, settings: ServerSettings) -> None:
        self.client: Any = None
        self.listed: list[Any] = []
        self._settings = settings
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def over(self) -> bool:
        """Whether the connection has ended by itself."""
        return self._task is None or self._task.done()

    async def begin(self) -> None:
        """Start the server and list its tools."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live(ready))
        try:
            await ready
        except asyncio.CancelledError:
            self._task.cancel()
            raise

    async def close(self) -> None:
        """Let the server end."""
        self._closing.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _live(self, ready: asyncio.Future[None]) -> None:
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client

        command = list(self._settings.command)
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _BOUND, *command]
        variables = {name: os.environ[name] for name in self._settings.variables if name in os.environ}
        parameters = StdioServerParameters(command=command[0], args=command[1:], env=variables)
        try:
            with open(2, "w", closefd=False) as errors:
                async with Client(stdio_client(parameters, errlog=errors)) as client:
                    found = await client.list_tools()
                    listed = list(found.tools)
                    while found.next_cursor:
                        found = await client.list_tools(cursor=found.next_cursor)
                        listed += found.tools
                    self.client, self.listed = client, listed
                    ready.set_result(None)
                    await self._closing.wait()
        except Exception as error:
            if not ready.done():
                ready.set_exception(error)


def _unsendable(arguments: Mapping[str, Any]) -> str | None:
    """Why arguments would break the connection instead of being refused by the server; None if they would not.

    A reply could otherwise fail its session, and be left out, whenever it is wrong.
    """
    depth = 0
    layer: list[Any] = [arguments]
    while layer:
        depth += 1
        inside = (each.values() if isinstance(each, Mapping) else each for each in layer)
        layer = [each for values in inside for each in values if isinstance(each, Mapping | list)]
    if depth > MOST_NESTED:
        return f"arguments are nested {depth} deep; expected at most {MOST_NESTED}"
    try:
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return "a text in the arguments holds half a character"
    except ValueError:
        return "a number in the arguments is not finite"
    return None


def _texts(content: Sequence[Any]) -> Iterator[str]:
    for block in content:
        yield block.text if block.type == "text" else f"({block.type})"


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="tool servers", daemon=True).start()
    return loop


def _wait(work: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """What the coroutine gives in the loop's thread. Raises LateError, after which it is cancelled."""
    promised = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return promised.result(seconds)
    except LateError:
        promised.cancel()
        raise
