"""The table of names. One place to grep: kind -> name -> "module:Class".

A name is looked up in this table, then among installed entry points (group `mrlm.<kind>`), then taken literally as
`package.module:Class` or `./file.py:Class` (looked up in the recipe's folder, then in the working directory).
Importing a built-in class imports no torch; a plugin is imported only when a recipe names it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from mrlm_cli import blame
from mrlm_cli.errors import UnknownName, UserError

BUILT_IN: dict[str, dict[str, str]] = {
    "environments": {
        "sort_digits": "mrlm_cli.envs.sort_digits:SortDigits",
        "code": "mrlm_cli.envs.code:Code",
        "tools": "mrlm_cli.envs.tools:Tools",
        "arithmetic": "mrlm_cli.envs.arithmetic:Arithmetic",
        "guess": "mrlm_cli.envs.guess:Guess",
        "debate": "mrlm_cli.envs.debate:Debate",
        "kuhn": "mrlm_cli.envs.kuhn:Kuhn",
        "sentiment": "mrlm_cli.envs.sentiment:Sentiment",
        "math": "mrlm_cli.envs.math:Math",
        "reasoning": "mrlm_cli.envs.reasoning:Reasoning",
        "textarena": "mrlm_cli.envs.textarena:TextArena",
        "gymnasium": "mrlm_cli.envs.gymnasium:Gymnasium",
        "verifiers": "mrlm_cli.envs.verifiers:Verifiers",
    },
    "algorithms": {
        "ppo": "mrlm_cli.algorithms.ppo:PPO",
        "group": "mrlm_cli.algorithms.group:Group",
        "grpo": "mrlm_cli.algorithms.group:GRPO",
        "dr_grpo": "mrlm_cli.algorithms.group:DrGRPO",
        "dapo": "mrlm_cli.algorithms.group:DAPO",
        "gspo": "mrlm_cli.algorithms.group:GSPO",
        "cispo": "mrlm_cli.algorithms.group:CISPO",
        "rloo": "mrlm_cli.algorithms.group:RLOO",
        "reinforce++": "mrlm_cli.algorithms.group:ReinforcePlusPlus",
        "reinforce++_baseline": "mrlm_cli.algorithms.group:ReinforcePlusPlusBaseline",
        "sft": "mrlm_cli.algorithms.sft:SFT",
        "dpo": "mrlm_cli.algorithms.dpo:DPO",
        "reward_model": "mrlm_cli.algorithms.reward_model:RewardModel",
    },
    "data": {
        "jsonl": "mrlm_cli.data.jsonl:Jsonl",
        "json": "mrlm_cli.data.jsonl:Json",
        "parquet": "mrlm_cli.data.parquet:Parquet",
        "hub": "mrlm_cli.data.hub:Hub",
        "episodes": "mrlm_cli.data.episodes:Episodes",
    },
    "rewards": {
        "regex": "mrlm_cli.rewards.text:Regex",
        "exact": "mrlm_cli.rewards.text:Exact",
        "length": "mrlm_cli.rewards.text:Length",
        "format": "mrlm_cli.rewards.text:Format",
        "lexicon": "mrlm_cli.rewards.text:Lexicon",
        "function": "mrlm_cli.rewards.function:Function",
        "reward_model": "mrlm_cli.rewards.reward_model:RewardModel",
        "judge": "mrlm_cli.rewards.judge:Judge",
        "local_judge": "mrlm_cli.rewards.local_judge:LocalJudge",
    },
    "players": {},
    "engines": {
        "cached": "mrlm_cli.engines.cached.engine:CachedEngine",
        "generate": "mrlm_cli.engines.generate:GenerateEngine",
    },
}


@cache
def _entry_points(kind: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for point in entry_points(group=f"mrlm.{kind}"):
        for table in (BUILT_IN[kind], found):
            if point.name in table and table[point.name] != point.value:
                raise UserError(f"two {kind} are called {point.name!r}: {table[point.name]} and {point.value}")
        found[point.name] = point.value
    return found


def names(kind: str) -> dict[str, str]:
    """All names of a kind with their `module:Class`, built-in first."""
    return {**BUILT_IN[kind], **_entry_points(kind)}


def resolve(kind: str, name: str, folders: Sequence[Path] = ()) -> type[Any]:
    """The class that `name` stands for.

    `folders` are searched for `./file.py:Class`. Raises UnknownName with the nearest name, UserError if a plugin's
    module or class cannot be imported.
    """
    table = names(kind)
    if name in table:
        target = table[name]
    elif ":" in name:
        target = name
    else:
        if name.endswith(".py"):
            raise UnknownName(f"{name!r} names a file but no class in it; write {name}:ClassName")
        near = [known for known in table if known.casefold() == name.casefold()]
        near += [known for known in table if sorted(known) == sorted(name)]  # two letters in each other's place
        near += difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(table))}"
        raise UnknownName(f"no {kind.removesuffix('s')} is called {name!r}; {hint}")
    place, _, attribute = target.rpartition(":")
    module = _load_file(plugin_file(place, folders)) if place.endswith(".py") else _import(place, name)
    found = getattr(module, attribute, None)
    if not isinstance(found, type):
        raise UnknownName(f"{place} has no class {attribute!r}")
    if unwritten := sorted(getattr(found, "__abstractmethods__", ())):
        raise UserError(f"{place}: class {attribute} is not finished; it has yet to write {', '.join(unwritten)}")
    return found


def function(name: str, folders: Sequence[Path] = ()) -> Callable[..., Any]:
    """The function that `./file.py:name` or `package.module:name` stands for.

    A file is looked for in `folders`, then in the working directory. Raises UnknownName, UserError.
    """
    place, _, attribute = name.rpartition(":")
    file = place.endswith(".py")
    module = _load_file(plugin_file(place, (*folders, Path.cwd()))) if file else _import(place, name)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UnknownName(f"{place} has no function {attribute!r}")
    return cast(Callable[..., Any], found)


def plugin_file(place: str, folders: Sequence[Path]) -> Path:
    """The file that `./my_env.py` means: in the first of `folders` that has it."""
    for folder in folders:
        path = (folder / place).resolve()
        if path.is_file():
            return path
    looked = ", ".join(dict.fromkeys(str(folder) for folder in folders)) or "nowhere"
    raise UnknownName(f"no file {place} (looked in {looked})")


def plugin_hashes(kind_names: Sequence[str], folders: Sequence[Path]) -> dict[str, str]:
    """sha256 of every plugin file among the given names, by path as written."""
    places = {name.rpartition(":")[0] for name in kind_names if ":" in name}
    return {
        place: hashlib.sha256(plugin_file(place, folders).read_bytes()).hexdigest()
        for place in sorted(places)
        if place.endswith(".py")
    }


def _load_file(path: Path) -> ModuleType:
    name = f"mrlm_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # a plugin may import its neighbours
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        where = "" if isinstance(error, SyntaxError) else blame.place(error)  # which says where itself
        raise UserError(
            f"{path} cannot be imported: {type(error).__name__}: {error}{f' ({where})' if where else ''}"
        ) from error
    return module


def _import(place: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except Exception as error:  # not only ImportError: a plugin's own code runs here
        raise UserError(f"{name}: {place!r} cannot be imported: {error}") from error
