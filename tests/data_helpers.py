"""Small datasets for tests, and an independent reading of their rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mrlm_cli.records import Batch, Episode
from mrlm_cli.training.collate import collate
from mrlm_cli.training.trainer import Trainer

DIGITS = "0123456789"
WORDS = ["20", "713", "4", "96", "5081", "33", "270", "8", "649", "15", "9042", "77"]


def chat_row(digits: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"sort {digits}="},
            {"role": "assistant", "content": "".join(sorted(digits))},
        ]
    }


def two_turns(digits: str) -> dict[str, Any]:
    """Two replies with an observation of some tokens between them."""
    return {
        "messages": [
            {"role": "user", "content": f"sort {digits}="},
            {"role": "assistant", "content": digits[0]},
            {"role": "user", "content": f"to {digits} "},
            {"role": "assistant", "content": digits[::-1]},
        ]
    }


def pair_row(digits: str, wrong: str | None = None) -> dict[str, Any]:
    right = "".join(sorted(digits))
    return {"prompt": f"sort {digits}=", "chosen": right, "rejected": wrong if wrong is not None else right[::-1] + "0"}


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(path: Path, count: int = 40, row: Any = chat_row) -> Path:
    """Rows with `count` different prompts of different lengths."""
    return jsonl(path, [row(f"{WORDS[index % len(WORDS)]}{index}") for index in range(count)])


def last_values(made: Trainer) -> tuple[list[Episode], Batch, list[float]]:
    """The first step's episodes, their batch, and the value after the last token of each."""
    episodes = made.source.episodes(0)
    batch = collate(episodes, "cpu", pairs=True)
    assert batch is not None
    out = made.policy(batch.tokens, batch.lengths, batch.mask, temperature=1.0)
    assert out.final_values is not None
    return episodes, batch, out.final_values.tolist()


def go_back(made: Trainer, whole: Path, step: int) -> None:
    """Make the run of `made` what the finished run `whole` was when it had saved `step`, and load that."""
    here = made.run.checkpoints.parent
    for name in ("metrics.jsonl", "checkpoints", "base"):
        source, copy = whole / name, here / name
        if copy.exists():
            shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
        if source.exists():
            shutil.copytree(source, copy, symlinks=True) if source.is_dir() else shutil.copy(source, copy)
    for later in made.run.checkpoints.glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    made.load(made.run.checkpoints / f"step-{step:06}")
    made.run.rewind(step)
