"""Do the agents of a recipe fit the roles of its environments?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mrlm_cli import registry
from mrlm_cli.errors import UserError
from mrlm_cli.recipe.agents import Agent, Learner, Scorer, Scripted
from mrlm_cli.recipe.problems import Problems, near, shown
from mrlm_cli.recipe.reading import Node
from mrlm_cli.strict import EnvironmentSettings


def check(
    node: Node,
    agents: Mapping[str, Agent],
    environments: Sequence[EnvironmentSettings],
    rewards: Sequence[str],
    folders: Sequence[Path],
    problems: Problems,
) -> None:
    """Tell `problems` of roles that no environment has, players and rewards that nobody knows, and environments without
    a learner.

    `node` is the section `agents`.
    """
    owners = {each.label: registry.resolve("environments", each.type, folders) for each in environments}
    roles: dict[str, tuple[str, ...]] = {each.label: owners[each.label].roles(each) for each in environments}
    known = list(dict.fromkeys(role for names in roles.values() for role in names))
    for role, agent in agents.items():
        if role not in known:
            hint = near(role, known) or f"; there are: {', '.join(known)}"
            problems.add(_inside(node, role).name_mark, f"agents.{role}", f"no environment here has such a role{hint}")
        elif isinstance(agent, Scorer):
            if agent.reward not in rewards:
                there = near(agent.reward, rewards) or f"; there are: {', '.join(rewards) or 'none'}"
                text = f"got {shown(agent.reward)}; no reward of the recipe is called so{there}"
                problems.add(_inside(node, role, "reward").mark, f"agents.{role}.reward", text)
        elif isinstance(agent, Scripted):
            for label in (label for label, names in roles.items() if role in names):
                players = owners[label].players
                if agent.player not in players and not _is_class(agent.player, folders):
                    there = near(agent.player, players) or f"; it has: {', '.join(players) or 'none'}"
                    text = f"got {shown(agent.player)}; environment {label} has no such player{there}"
                    problems.add(_inside(node, role, "player").mark, f"agents.{role}.player", text)
    for label, names in roles.items():
        if not any(isinstance(agents.get(role, Learner(type="learner")), Learner) for role in names):
            problems.add(node.name_mark, "agents", f"no role of {label} learns; leave out one of {', '.join(names)}")


def _inside(node: Node, *path: str) -> Node:
    for part in path:
        if isinstance(node.value, dict):
            node = node.value[part]
    return node


def _is_class(name: str, folders: Sequence[Path]) -> bool:
    if ":" not in name:
        return name in registry.names("players")
    try:
        registry.resolve("players", name, folders)
    except UserError:
        return False
    return True
