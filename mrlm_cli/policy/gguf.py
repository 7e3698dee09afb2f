"""Models from GGUF files, dequantised to fp32 (extra `gguf`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from mrlm_cli.errors import CheckpointError, MissingExtra, UserError
from mrlm_cli.policy.pretrained import settled, without_dropout
from mrlm_cli.policy.quiet import quiet


def require() -> None:
    """Raises MissingExtra without the packages gguf and accelerate."""
    if any(importlib.util.find_spec(package) is None for package in ("gguf", "accelerate")):
        raise MissingExtra("reading a GGUF file", "gguf")


def read(file: Path) -> tuple[Any, Any]:
    """(causal LM in fp32 and evaluation mode, tokenizer) of a `.gguf` file.

    Raises MissingExtra, UserError if there is no such file, CheckpointError if it cannot be read.
    """
    require()
    file = file.expanduser()
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
            without_dropout(config)
            lm = AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                config=config,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
                local_files_only=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                str(file.parent), gguf_file=file.name, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # a border: the readers raise all kinds for a broken file; the cause is kept
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"the GGUF file {file} cannot be read: {reason}") from error
    return settled(lm), tokenizer
