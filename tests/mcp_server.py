"""A small MCP server for tests: run as a program, it speaks over standard input and output."""

import os
import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("tests")
kept: list[str] = []


@server.tool()
def add(a: int, b: int) -> int:
    """Add two whole numbers."""
    return a + b


@server.tool()
def keep(text: str) -> str:
    """Keep a text, and say all that was kept."""
    kept.append(text)
    return " ".join(kept)


@server.tool()
def refuse() -> str:
    """Never content."""
    raise ValueError("not today")


@server.tool()
def sleep(seconds: float) -> str:
    """Take its time."""
    time.sleep(seconds)
    return "awake"


@server.tool()
def die() -> str:
    """End the server in the middle of a call."""
    os._exit(3)


@server.tool()
def process() -> str:
    """Which process this is, and what it is given."""
    return f"{os.getpid()} {os.environ.get('MRLM_TEST_VARIABLE')} {os.environ.get('MRLM_TEST_SECRET')}"


if __name__ == "__main__":
    server.run("stdio")
