"""Small datasets for tests, and an independent reading of their rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
