"""Low-rank adapters (Hu et al. 2021, "LoRA") by peft (extra `lora`), on disk as peft has them.

    directory/adapter_config.json, adapter_model.safetensors   as peft.PeftModel.from_pretrained(base, directory) reads

The base is found by `base_model_name_or_path`; the sha256 of its weights lies beside them in base.sha256, so that
adapters are never put on another base. Left out: dropout, biases, DoRA and other variants, trained embeddings.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, its weight the other way round

from mrlm_cli.errors import CheckpointError, MissingExtra, UserError
from mrlm_cli.recipe.sections import Lora
from mrlm_cli.recipe.shape import ADAPTER_CONFIG

ADAPTER_FILE = "adapter_model.safetensors"
BASE_FILE = "base.sha256"
_NAME = "default"
_PREFIX = "base_model.model."  # peft's wrapper around the language model


@dataclass(frozen=True, slots=True)
class Base:
    """What adapters stand on."""

    path: str | None  # a directory or hub id that others can read; None: only the run itself has it
    sha256: str


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("model.lora, or a model that is adapters,", "lora") from error
    return peft


def attach(module: Any, section: Lora, generator: torch.Generator) -> None:
    """Put adapters on the linear layers of a transformers model, in place, and freeze everything else.

    B = 0, so that nothing changes at first; A is uniform in ±1/sqrt(inputs), peft's own start, drawn from `generator`
    in the order of names. Raises MissingExtra, and UserError for targets that the model does not have.
    """
    peft = _peft()
    layers = dict(_linear_layers(module))
    there = sorted({name.rpartition(".")[2] for name in layers})
    if unknown := [name for name in section.targets if name not in there]:
        raise UserError(f"model.lora.targets: this model has no linear layer {unknown[0]}; it has {', '.join(there)}")
    alpha = int(section.alpha) if section.alpha.is_integer() else section.alpha
    config = peft.LoraConfig(
        r=section.rank,
        lora_alpha=alpha,
        target_modules=list(section.targets or there),
        fan_in_fan_out=not all(isinstance(layer, nn.Linear) for layer in layers.values()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), _calm():  # what peft draws from the global generator is replaced
        peft.inject_adapter_in_model(config, module, adapter_name=_NAME)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if ".lora_A." in name:
                bound = parameter.shape[1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            elif ".lora_B." in name:
                parameter.zero_()


def has_adapters(module: nn.Module) -> bool:
    """Whether `attach` was here."""
    return any(True for _ in _adapted(module))


def without_adapters(module: Any) -> Any:
    """The module as it was before `attach`: other module objects, the same frozen parameters, no second copy."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    plain = copy.deepcopy(module, shared)
    for name, layer in list(_adapted(plain)):
        parent, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, layer.base_layer)
    for part in plain.modules():
        vars(part).pop("peft_config", None)
    return plain


def effective(module: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of every parameter of the module without adapters, their product added where there is one."""
    layers = dict(_adapted(module))
    for name, parameter in without_adapters(module).named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner in layers and leaf == "weight":
            yield name, parameter.detach() + layers[owner].get_delta_weight(_NAME).detach()
        else:
            yield name, parameter


def fingerprint(module: Any) -> str:
    """A sha256 of the weights and their names, adapters left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(without_adapters(module).state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(lm: Any, directory: Path, base: Base) -> None:
    """Write the adapters of a causal LM as peft expects them."""
    directory.mkdir(parents=True, exist_ok=True)
    config = lm.peft_config[_NAME].to_dict()
    config |= {"base_model_name_or_path": base.path, "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (directory / ADAPTER_CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True), encoding="utf-8")
    tensors = {_file_name(name): tensor.detach().cpu().contiguous() for name, tensor in _parameters(lm).items()}
    save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
    (directory / BASE_FILE).write_text(base.sha256 + "\n", encoding="utf-8")


def stored(lm: Any, directory: Path, base: Base) -> dict[str, Tensor]:
    """The adapters that `save` wrote, by the names of the parameters of `lm`, which has the same ones.

    Raises CheckpointError if there are none, or they belong to another base.
    """
    tensors = _read(directory)
    _check_base(directory, base.sha256)
    names = {_file_name(name): name for name in _parameters(lm)}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def merge(lm: Any, directory: Path) -> Any:
    """The causal LM `lm` with the LoRA adapters of `directory` added to its weights for good.

    Raises MissingExtra, UserError for adapters of another kind, CheckpointError for a file that cannot be read whole
    or that belongs to another base.
    """
    peft = _peft()
    tensors = _read(directory)
    if (directory / BASE_FILE).is_file():  # adapters from elsewhere have none
        _check_base(directory, fingerprint(lm))
    config = peft.PeftConfig.from_pretrained(str(directory))
    if config.peft_type != peft.PeftType.LORA:
        raise UserError(f"{directory} holds adapters of kind {config.peft_type.value}; only LORA can be merged")
    with _calm():
        adapted = peft.PeftModel.from_pretrained(lm, str(directory), config=config)
    if odd := sorted(peft.get_peft_model_state_dict(adapted).keys() ^ tensors.keys()):
        raise CheckpointError(f"the adapters in {directory} do not fit their base: {odd[0]} is only on one side")
    return adapted.merge_and_unload().requires_grad_(True)  # peft has frozen them


@contextmanager
def _calm() -> Iterator[None]:
    """Without the warnings that peft's calls of transformers' older names set off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _linear_layers(module: Any) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of those that peft can put an adapter on, in the body of a model: its head is not among them."""
    for name, layer in module.base_model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            yield name, layer


def _adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer with an adapter."""
    yield from ((name, layer) for name, layer in module.named_modules() if hasattr(layer, "lora_A"))


def _parameters(lm: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in lm.named_parameters() if ".lora_" in name}


def _file_name(name: str) -> str:
    return _PREFIX + name.replace(f".{_NAME}.", ".")


def _read(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter directory, by their names in the file."""
    file = directory / ADAPTER_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory} holds no {ADAPTER_FILE}")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the adapters in {file} cannot be read: {error}") from error


def _check_base(directory: Path, here: str) -> None:
    try:
        then = (directory / BASE_FILE).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / BASE_FILE} cannot be read: {error}") from error
    if then != here:
        raise CheckpointError(
            f"{directory}: the model that its adapters were trained on has changed since, or is another one"
        )
