"""What is wrong with a recipe, one line each: `file:line:column key.path: what was given; what is expected`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mrlm_cli.errors import RecipeError
from mrlm_cli.recipe.reading import Mark, Node

_BOUNDS = {
    "greater_than": ("gt", "a number above"),
    "greater_than_equal": ("ge", "a number of at least"),
    "less_than": ("lt", "a number below"),
    "less_than_equal": ("le", "a number of at most"),
}
_KINDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text (quote it if it looks like a number)",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "none_required": "null",
}
LIST_KINDS = ("tuple_type", "list_type")  # what pydantic calls the lack of a list


# other usual names of settings, by their last word
SYNONYMS = {
    "learning_rate": "optimizer.lr",
    "warmup_steps": "optimizer.warmup",
    "lr_scheduler_type": "optimizer.schedule",
    "ppo_epochs": "optimizer.passes",
    "num_ppo_epochs": "optimizer.passes",
    "num_iterations": "optimizer.passes",
    "num_mini_batches": "optimizer.minibatches",
    "grad_clip": "optimizer.max_grad_norm",
    "micro_batch_size": "optimizer.tokens_per_micro_batch",
    "per_device_train_batch_size": "optimizer.tokens_per_micro_batch",
    "max_steps": "steps",
    "total_steps": "steps",
    "batch_size": "sampling.tasks_per_step",
    "num_generations": "sampling.episodes_per_task",
    "group_size": "sampling.episodes_per_task",
    "rollouts_per_prompt": "sampling.episodes_per_task",
    "max_completion_length": "sampling.max_new_tokens",
    "max_length": "sampling.max_tokens",
    "lam": "algorithm.gae_lambda",
    "lambda": "algorithm.gae_lambda",
    "clip_range": "algorithm.clip",
    "cliprange": "algorithm.clip",
    "epsilon": "algorithm.clip",
    "vf_coef": "algorithm.value_coef",
    "ent_coef": "algorithm.entropy.coef",
    "entropy_coef": "algorithm.entropy.coef",
    "kl_coef": "algorithm.kl.coef",
    "init_kl_coef": "algorithm.kl.coef",
    "beta": "algorithm.kl.coef",
    "eval_steps": "evaluate.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
}


class Problems:
    """Collects problems, so that one run shows them all."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, mark: Mark, path: str, text: str) -> None:
        """One more problem; a second one with the same text at the same place is not repeated."""
        line = mark.says(path, text)
        if line not in self._lines:
            self._lines.append(line)

    def __bool__(self) -> bool:
        return bool(self._lines)

    def raise_if_any(self) -> None:
        """Raises RecipeError with one line for each problem."""
        if self._lines:
            raise RecipeError("\n".join(self._lines))


def near(name: str, names: Iterable[str]) -> str:
    """`; did you mean x?` for the nearest name, or nothing."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def shown(value: Any) -> str:
    """A value as a person may have written it, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def suggestion(path: str, siblings: Sequence[str], known: Sequence[str]) -> str:
    """What an unknown key may have meant: the same name elsewhere, a usual name for it, a sibling or anything like it.

    `path` is the key as given, `siblings` the names allowed beside it, `known` the path of every setting.
    """
    leaf = path.rpartition(".")[2]
    elsewhere = sorted((key for key in known if key.rpartition(".")[2] == leaf), key=lambda key: key.count("."))
    if elsewhere and elsewhere[0] != path:
        return f"; did you mean {elsewhere[0]}?"
    usual = SYNONYMS.get(leaf)
    if usual is not None and usual in known:
        return f"; did you mean {usual.rpartition('.')[2] if usual.rpartition('.')[2] in siblings else usual}?"
    close = difflib.get_close_matches(leaf, siblings, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    by_leaf = {key.rpartition(".")[2]: key for key in sorted(known, key=lambda key: -key.count("."))}
    by_leaf.pop(leaf, None)  # a key of another type in this very place
    far = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75)
    if far:
        return f"; did you mean {by_leaf[far[0]]}?"
    return f"; allowed here: {', '.join(siblings)}" if siblings else ""


def sentence(error: Mapping[str, Any], a_list: str = "a list") -> str:
    """One pydantic error in our words: what was given, what is expected; `a_list` where that is one."""
    kind, context, given = error["type"], error.get("ctx", {}), error["input"]
    if kind == "missing":
        return "an item is missing" if isinstance(error["loc"][-1], int) else "required, and missing"
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        expected = f"{words} {context[name]:g}" if isinstance(context[name], float) else f"{words} {context[name]}"
    elif kind == "literal_error":
        options = context["expected"].replace("'", "").replace(" or ", ", ")
        hint = near(given, options.split(", ")) if isinstance(given, str) else ""
        return f"got {shown(given)}; expected one of {options}{hint}"
    elif kind in _KINDS:
        expected = _KINDS[kind]
    elif kind in LIST_KINDS:
        expected = a_list
    elif kind in ("too_short", "too_long"):
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        expected = f"{bound} items, not {context['actual_length']}"
    else:
        expected = error["msg"].removeprefix("Input should be ")
    return f"got {shown(given)}; expected {expected}"


def locate(node: Node, location: Sequence[int | str], missing: bool) -> tuple[Node, list[str]]:
    """The node that a pydantic location speaks of, and its path in the recipe.

    Parts that name no key of the recipe (a union's branch, a validator) are skipped; a missing key stays at the end of
    the path, and the node is then the mapping that lacks it.
    """
    path: list[str] = []
    for position, part in enumerate(location):
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[str(part)]
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        elif missing and position == len(location) - 1:
            path.append(str(part))
            break
        else:
            continue
        path.append(str(part))
    return node, path
