"""What `mrlm explain` answers: settings, sections, metrics and registered names by their key."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import asdict, dataclass
from typing import Any

from mrlm_cli import metrics, registry
from mrlm_cli.errors import UnknownName
from mrlm_cli.recipe import explain
from mrlm_cli.recipe.explain import Setting
from mrlm_cli.recipe.schema import PLUGINS


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer, for people and for programs."""

    text: str
    data: dict[str, Any]


def explained(key: str) -> list[Entry]:
    """Everything that the key means. Raises UnknownName with the nearest key."""
    settings = explain.settings()
    wanted, variant = _normal(key)
    found = [each for each in settings if each.path == wanted and variant in (None, each.variant)]
    entries = [_setting(each, settings) for each in _merged(found)]
    entries += [_named(kind, key) for kind in registry.BUILT_IN if key in registry.names(kind)]
    metric = metrics.describe(key)
    if metric is not None:
        text = f"{key}: {metric.sentence}\n  formula  {metric.formula}\n  good     {metric.good}"
        entries.append(Entry(text, {"kind": "metric", **asdict(metric), "name": key}))
    if not entries:
        leaves = [each for each in settings if each.path.rpartition(".")[2] == key]
        if len({each.path for each in leaves}) == 1:  # a last word that only one setting has
            entries = [_setting(each, settings) for each in _merged(leaves)]
    if not entries:
        raise UnknownName(f"nothing is called {key}; {_hint(key, [each.path for each in settings])}")
    return entries


def _normal(key: str) -> tuple[str, str | None]:
    """The path without list indices, and the `type` that may stand behind the section: environments.guess.turns."""
    parts = [part for part in key.split(".") if not part.isdecimal()]
    variants = (
        {each.variant for each in explain.settings() if each.path.partition(".")[0] == parts[0]} if parts else set()
    )
    if len(parts) > 2 and parts[1] in variants - {None}:
        return ".".join([parts[0], *parts[2:]]), parts[1]
    return ".".join(parts), None


def _merged(found: list[Setting]) -> list[Setting]:
    """Equal answers of several types as one."""
    kept: dict[tuple[str, str, str, str], Setting] = {}
    for each in found:
        same = (each.path, each.sentence, each.type, each.default)
        if same in kept:
            variants = f"{kept[same].variant}, {each.variant}"
            kept[same] = Setting(each.path, variants, each.sentence, each.type, each.default)
        else:
            kept[same] = each
    return list(kept.values())


def _setting(each: Setting, settings: list[Setting]) -> Entry:
    below = [other.path for other in settings if other.path.startswith(f"{each.path}.")]
    own = list(dict.fromkeys(path for path in below if path.count(".") == each.path.count(".") + 1))
    name = each.path if each.variant is None else f"{each.path} (type {each.variant})"
    lines = [f"{name}: {each.sentence}"]
    if own:
        lines.append(f"  keys     {', '.join(path.rpartition('.')[2] for path in own)}")
    else:
        lines += [f"  type     {each.type}", f"  default  {each.default}"]
    return Entry("\n".join(lines), {"kind": "setting", **asdict(each), "keys": own})


def _named(kind: str, name: str) -> Entry:
    owner = registry.resolve(kind, name)
    sentence = inspect.cleandoc(owner.__doc__ or owner.__name__)
    keys = list(owner.Config.model_fields)
    section = next(section for section, (kind_of, _) in PLUGINS.items() if kind_of == kind)
    text = f"{name} ({kind}): {sentence}\n  keys     {', '.join(keys)}\n  a key    mrlm explain {section}.{name}.KEY"
    return Entry(text, {"kind": kind, "name": name, "sentence": sentence, "keys": keys})


def _hint(key: str, paths: list[str]) -> str:
    names = [name for kind in registry.BUILT_IN for name in registry.names(kind)]
    leaves = sorted((path for path in paths if path.rpartition(".")[2] == key), key=lambda path: path.count("."))
    close = leaves[:1] or difflib.get_close_matches(key, [*paths, *metrics.METRICS, *names], n=1)
    if not close:
        last = {path.rpartition(".")[2]: path for path in reversed(paths)}
        close = [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)]
    return f"did you mean {close[0]}?" if close else "see mrlm list, or mrlm explain optimizer"
