"""play: a person is the policy, in the terminal or through a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.text import Text

from mrlm_cli.cli.arguments import LENIENT, is_override, words
from mrlm_cli.errors import UserError
from mrlm_cli.records import Split

_STYLES = {"system": "dim", "user": "cyan", "assistant": "green", "tool": "magenta"}


_CALL = '{"name": "…", "arguments": {…}}'


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("play", rich_help_panel="Models", context_settings=LENIENT)(play)


def play(
    context: typer.Context,
    environment: Annotated[str, typer.Argument(help="An environment's name, or ./file.py:Class.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Its settings, such as digits=4.", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "train",
    number: Annotated[int, typer.Option("--task", help="Which task of the split.", min=0)] = 0,
    seed: Annotated[int, typer.Option("--seed", help="The session's seed.", min=0)] = 0,
) -> None:
    """Be the policy: answer a task of an environment, see what each turn earns.

    One line is one reply; a line that ends in a backslash goes on in the next. End of input leaves.
    """
    name, *given = words(context, [environment, *(settings or ())])
    if is_override(name) or not all(is_override(word) for word in given):
        raise UserError("expected one environment and its settings: mrlm play ENVIRONMENT [key=value …]")
    if split not in ("train", "validation", "test"):
        raise UserError(f"--split {split}: expected train, validation or test")
    from mrlm_cli import api

    terminal = Terminal(Console(highlight=False, soft_wrap=True))
    played = api.play(name, given, split=cast(Split, split), index=number, seed=seed, person=terminal)
    for agent, components in played.components.items():
        listed = ", ".join(f"{component} {value:g}" for component, value in components.items()) or "nothing"
        whose = f"{agent}: " if len(played.components) > 1 else ""
        terminal.tell(f"{whose}{listed}; reward {played.reward[agent]:g} in {played.turns} turns", "bold")
    if played.right is not None and played.finished:
        terminal.tell(f"a right answer: {played.right}", "dim")
    if not played.finished:
        raise UserError(f"the input ended after {played.turns} replies, before the session did")


class Terminal:
    """A person at a terminal, or at the other end of a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._agents: list[str] = []  # who saw something so far
        self._tools: Sequence[Any] = ()

    def see(self, agent: str, messages: Sequence[Any], tools: Sequence[Any]) -> None:
        """Print what the agent sees, and under whose name where there are several; tools when they change."""
        if agent not in self._agents:
            self._agents.append(agent)
        whose = f"{agent} " if agent != "policy" or len(self._agents) > 1 else ""
        if tools != self._tools:
            self._tools = tools
            for tool in tools:
                self.tell(f"[tool] {json.dumps(tool['function'], ensure_ascii=False)}", "dim")
            if tools:
                self.tell(f"[tool] call one by <tool_call>{_CALL}</tool_call>", "dim")
        for message in messages:
            name = f" {message.name}" if message.name else ""
            self.tell(f"{whose}[{message.role}{name}] {message.content}", _STYLES.get(message.role, ""))

    def earned(self, rewards: Mapping[str, Mapping[str, float]], facts: Mapping[str, float]) -> None:
        """Print what the last reply earned."""
        for agent, components in rewards.items():
            listed = ", ".join(f"{component} {value:g}" for component, value in components.items())
            self.tell(f"{agent} earned {listed or 'nothing'}", "yellow")
        if facts:
            self.tell(", ".join(f"{name} {value:g}" for name, value in facts.items()), "dim")

    def say(self, agent: str) -> str | None:
        """Read a reply from stdin; None at its end."""
        lines: list[str] = []
        while True:
            if sys.stdin.isatty():
                self._console.print(Text(f"{agent}> " if not lines else "... "), end="")
            line = sys.stdin.readline()
            if not line:
                return "\n".join(lines) if lines else None
            line = line.removesuffix("\n")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line.removesuffix("\\"))

    def tell(self, text: str, style: str) -> None:
        """Print one line, its characters as they are."""
        self._console.print(Text(text, style))
