"""A policy as a plain transformers directory: config, weights in safetensors, tokenizer with its chat template."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from mrlm_cli.errors import UserError
from mrlm_cli.policy import load, pretrained
from mrlm_cli.policy.quiet import quiet
from mrlm_cli.recipe.shape import ADAPTER_CONFIG
from mrlm_cli.training import durable, targets

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(target: Path, directory: Path, dtype: str | None, best: bool) -> str:
    """Write the model of a run, a checkpoint or a model's directory; returns what was done in words.

    A whole model's files are copied as they are, unless `dtype` asks for another type; adapters are merged into their
    base in float32. `directory` is there whole or not at all. Raises UserError if it exists or the type is unknown, and
    what `targets.find` and `pretrained.read` raise.
    """
    if os.path.lexists(directory):
        raise UserError(f"{directory} exists already; choose a directory that does not")
    if dtype is not None and dtype not in TYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(TYPES)}")
    found = targets.find(target, best)[1]
    place = pretrained.model_directory(target) if found is None else found / "policy"
    building = durable.temporary(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        done = _write(place, building, dtype)
        durable.sync_tree(building)
        os.rename(building, directory)
    except BaseException:
        durable.remove(building)
        raise
    left_out = "; the value function is left out" if (place.parent / load.VALUE_FILE).is_file() else ""
    return f"{directory}: {done}{left_out}"


def _write(place: Path, directory: Path, dtype: str | None) -> str:
    adapters = (place / ADAPTER_CONFIG).is_file()
    if dtype is None and not adapters:
        pretrained.refuse_pickle(place)
        shutil.copytree(place, directory)
        return "the policy's files as they are"
    lm, tokenizer = pretrained.read(str(place))
    lm = lm.to(TYPES[dtype or "float32"])
    with quiet():
        lm.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return f"{lm.num_parameters():,} parameters in {dtype or 'float32'}" + (", adapters merged" if adapters else "")
