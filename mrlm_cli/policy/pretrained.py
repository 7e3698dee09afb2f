"""Reading language models and tokenizers from a directory or a hub id: safetensors only, never code, never pickle."""

from __future__ import annotations

import copy
import hashlib
import re
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub.constants import ENDPOINT
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mrlm_cli.errors import CheckpointError, MrlmError, UserError
from mrlm_cli.policy import lora
from mrlm_cli.policy.fetch import KNOWN, missing
from mrlm_cli.policy.quiet import quiet
from mrlm_cli.recipe import checkpoints
from mrlm_cli.recipe.outside import is_local
from mrlm_cli.recipe.shape import ADAPTER_CONFIG, adapter_base, is_model

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def model_directory(path: Path) -> Path:
    """The model's directory that `path` means: of a run (its newest whole checkpoint), of a checkpoint, or itself.

    Raises UserError if nothing is there or it is none of these, CheckpointError if it is broken.
    """
    path = path.expanduser()
    if not path.exists():
        raise UserError(missing(path))
    if not path.is_dir():
        raise UserError(f"{path} is a file; a model is a directory with config.json and .safetensors, or a .gguf")
    if is_model(path):
        return path
    return checkpoint_directory(path) / "policy"


def checkpoint_directory(path: Path) -> Path:
    """The whole checkpoint that `path` means: a run's newest one, or a checkpoint itself.

    Raises CheckpointError if it is broken, UserError if `path` is neither.
    """
    if is_model(path / "policy"):
        if (path / checkpoints.MANIFEST).is_file():
            checkpoints.verify(path)
        return path
    broken: list[str] = []
    newest = checkpoints.newest_whole(path / "checkpoints", broken.append)
    if newest is None and broken:
        raise CheckpointError(f"{path} has no whole checkpoint: {broken[0]}")
    if newest is None:
        raise UserError(f"{path} holds no model: neither config.json nor policy/ nor a checkpoint of a run")
    print("".join(f"{text}\n" for text in broken), end="", file=sys.stderr)
    return newest.resolve()


def fingerprint(path: str) -> str | None:
    """A sha256 of all files of the model that `path` means (`model_directory`, or a file); None if nothing is there.

    Raises UserError, CheckpointError.
    """
    place = Path(path).expanduser()
    if not place.exists():
        return None
    if place.is_file():
        return hashed(place.parent, [place])
    directory = model_directory(place)
    return hashed(directory, directory.glob("*"))


def hashed(directory: Path, paths: Iterable[Path]) -> str:
    """A sha256 of the files among the paths, and of their names within the directory. Raises CheckpointError."""
    digest = hashlib.sha256()
    for file in sorted(path for path in paths if not path.is_dir()):
        try:
            with file.open("rb") as content:
                inside = hashlib.file_digest(content, "sha256").digest()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
        digest.update(file.relative_to(directory).as_posix().encode() + b"\0" + inside)
    return digest.hexdigest()


def read(path: str) -> tuple[Any, Any]:
    """(causal LM in fp32 and evaluation mode, dropout set to 0; tokenizer) of a directory, a run or a hub id.

    Adapters are merged into their base. Every parameter and buffer lies in an allocation of its own, whatever file it
    was mapped from. Raises UserError if there is nothing, CheckpointError if it cannot be read whole, MissingExtra for
    adapters without the extra.
    """
    place = Path(path).expanduser()
    if place.exists():
        directory = model_directory(place)
        if (directory / ADAPTER_CONFIG).is_file():
            return _adapted(directory)
        refuse_pickle(directory)
        source = str(directory)
    elif is_local(path) or place.name in KNOWN or HUB_ID.fullmatch(path) is None:
        raise UserError(missing(place))
    else:
        source = path
    local = place.exists()
    on_disk = local or not _hub_answers()  # what was downloaded before still loads; nothing waits for retries
    with quiet(), _readable(source, local):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=on_disk)
        without_dropout(config)
        lm, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=on_disk,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=on_disk)
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise CheckpointError(f"{source} lacks {len(lacking)} of the model's tensors, {lacking[0]} among them")
    return settled(lm), tokenizer


def untrained(directory: Path) -> Any:
    """A causal LM of the configuration in a directory, its weights still to come. Raises CheckpointError."""
    with quiet(), _readable(str(directory), True):
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        without_dropout(config)
        return settled(AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False))


def _adapted(directory: Path) -> tuple[Any, Any]:
    """(the base of the adapters in `directory`, with them merged; the tokenizer beside them, else the base's)."""
    base = Path(adapter_base(directory)).expanduser()
    if base.is_dir() and ((base / ADAPTER_CONFIG).is_file() or not (base / "config.json").is_file()):
        raise CheckpointError(f"the base of the adapters in {directory} must be a whole model, and {base} is none")
    lm, tokenizer = read(str(base) if base.exists() else adapter_base(directory))
    with quiet(), _readable(str(directory), True):
        lm = lora.merge(lm, directory)
        if (directory / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    return settled(lm), tokenizer


def settled(lm: Any) -> Any:
    """The model as mrlm holds every model: own allocations, evaluation mode, gradients everywhere, savable settings."""
    fresh_allocations(lm)
    # Tokens behind a row's length never reach the loss, and pad may be the end token, whose gradient counts.
    embedding = lm.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None
    try:
        lm.generation_config.validate(strict=True)
    except ValueError:  # transformers refuses to save some settings that it loads; only these are given up
        lm.generation_config = GenerationConfig.from_model_config(lm.config)
    return lm.eval()


def fresh_allocations(module: nn.Module) -> None:
    """Copy every parameter and buffer to a contiguous allocation of its own; tied parameters stay tied."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def without_dropout(config: Any) -> None:
    """Set every dropout probability of a transformers configuration to zero, those of its sub-configurations too."""
    for key, value in copy.copy(vars(config)).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            without_dropout(value)
        elif ("drop" in key) and isinstance(value, float | int) and not isinstance(value, bool):
            setattr(config, key, 0.0)


def _hub_answers() -> bool:
    """Whether the hub's name is known to this machine's resolver: without a network it is not."""
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def refuse_pickle(directory: Path) -> None:
    """Raises CheckpointError for a directory without safetensors."""
    if any(directory.glob("*.safetensors")):
        return
    for pattern in PICKLES:
        for file in directory.glob(pattern):
            raise CheckpointError(f"{file} is a pickle, which can run code when read; convert the model to safetensors")
    raise CheckpointError(f"{directory} holds no .safetensors file")


@contextmanager
def _readable(source: str, local: bool) -> Iterator[None]:
    """Whatever transformers, safetensors or the file system raise about a model becomes one sentence."""
    try:
        yield
    except MrlmError:
        raise
    except Exception as error:  # a border: the readers raise all kinds for a broken file; the cause is kept
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if local:
            raise CheckpointError(f"the model in {source} cannot be read: {reason}") from error
        raise UserError(f"{source} is no directory here and could not be had from the hub: {reason}") from error
