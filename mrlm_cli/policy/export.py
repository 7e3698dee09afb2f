"""A policy as a plain transformers directory: config, weights in safetensors, tokenizer with its chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from mrlm_cli.errors import UserError
from mrlm_cli.policy import pretrained
from mrlm_cli.recipe.shape import ADAPTER_CONFIG

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(source: Path, directory: Path, dtype: str | None) -> str:
    """Write the model of `source` (a directory, or a run's) to `directory`, which is made; says in words what was done.

    Without `dtype` a whole model's files are copied as they are; adapters are merged into their base in float32. Raises
    UserError for an unknown type, and what `pretrained.read` raises.
    """
    if dtype is not None and dtype not in TYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(TYPES)}")
    place = pretrained.model_directory(source)
    adapters = (place / ADAPTER_CONFIG).is_file()
    if dtype is None and not adapters:
        pretrained.refuse_pickle(place)
        shutil.copytree(place, directory)
        return "the policy's files as they are"
    lm, tokenizer = pretrained.read(str(place))
    lm = lm.to(TYPES[dtype or "float32"])
    with pretrained.quiet():
        lm.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    merged = ", adapters merged" if adapters else ""
    return f"{lm.num_parameters():,} parameters in {dtype or 'float32'}{merged}"
