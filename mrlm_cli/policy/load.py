"""Policies from a recipe's model section, and to and from checkpoint directories.

directory/policy/                       config, weights in safetensors, tokenizer: loads in plain transformers; with
                                        adapters those alone and the tokenizer, as peft has them (see `lora`)
directory/value.safetensors             the value head, or the critic whole, adapters merged; absent without values
directory/critic/config.json            the configuration of a critic's trunk, which may be another than the policy's
directory/critic/trained.safetensors    what is trained of a critic with adapters: a run goes on from these bits
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mrlm_cli.errors import CheckpointError, UserError
from mrlm_cli.kernels.llama import Trunk
from mrlm_cli.policy import lora, pretrained, scratch
from mrlm_cli.policy.chat import Chat
from mrlm_cli.policy.model import Policy
from mrlm_cli.policy.pretrained import model_directory
from mrlm_cli.policy.quiet import quiet
from mrlm_cli.policy.trunk import checkpoint_activations
from mrlm_cli.policy.value import Critic, ValueHead
from mrlm_cli.recipe.sections import ModelSection, ScratchModel, Value
from mrlm_cli.recipe.shape import ADAPTER_CONFIG

__all__ = ["build", "fingerprint", "load_weights", "model_directory", "reference", "save", "save_base"]

VALUE_FILE = "value.safetensors"
CRITIC = "critic"
TRAINED_FILE = "trained.safetensors"


@quiet()
def build(
    model: ModelSection, *, seed: int, device: str, precision: str, gradient_checkpointing: bool, values: bool = True
) -> tuple[Policy, Chat]:
    """The policy, with its value function where `values`, and the door to its tokens.

    What is random (a scratch model, a value head) depends on `seed` alone; the global random state is left as it was.
    Weights are fp32 in allocations of their own. Raises UserError for a model that is not there or of an unsupported
    kind, CheckpointError for one that cannot be read, MissingExtra for a GGUF file or adapters without their extra.
    """
    lm, tokenizer = _language_model(model, seed)
    width = int(lm.get_input_embeddings().weight.shape[1])
    value = _value(model.value, lm, width, seed, shares=model.lora is not None) if values else None
    policy = Policy(lm, value, precision=precision, trunk_gradient=model.value.trunk_gradient)
    _check_head(policy)
    if model.lora is not None:
        policy.base = lora.Base(_lasting(model), lora.fingerprint(lm))
        lora.attach(lm, model.lora, scratch.generator(seed, "lora"))
        if isinstance(value, Critic):
            lora.attach(value.trunk, model.lora, scratch.generator(seed, "critic lora"))
    if gradient_checkpointing:
        checkpoint_activations(lm)
        if isinstance(value, Critic):
            checkpoint_activations(value.trunk)
    policy.eval().to(device)
    context = getattr(lm.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return policy, Chat(tokenizer, model.chat, vocabulary=policy.vocabulary, context=int(context))


def save(policy: Policy, tokenizer: Any, directory: Path, *, base: str | None = None) -> None:
    """Write `directory/policy/` and the files of a value function. Raises CheckpointError.

    `base` is where the base of the adapters lies, if the policy's own does not say; see `save_base`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with quiet():
            if policy.base is None:
                policy.lm.save_pretrained(directory / "policy")
            else:
                lora.save(policy.lm, directory / "policy", replace(policy.base, path=policy.base.path or base))
            tokenizer.save_pretrained(directory / "policy")
        if policy.value is not None:
            _save_tensors(dict(lora.effective(policy.value)), directory / VALUE_FILE)
        if isinstance(policy.value, Critic):
            config: Any = policy.value.trunk.config
            config.save_pretrained(directory / CRITIC)
            if lora.has_adapters(policy.value):
                _save_tensors(_trained(policy.value), directory / CRITIC / TRAINED_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the policy to {directory}: {error}") from error


def save_base(policy: Policy, tokenizer: Any, directory: Path) -> None:
    """Write what the policy's adapters stand on to `directory`: loads in plain transformers. Raises CheckpointError."""
    try:
        with quiet():
            lora.without_adapters(policy.lm).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the base of the adapters to {directory}: {error}") from error


def load_weights(policy: Policy, directory: Path) -> None:
    """Put the weights that `save` wrote back, bit for bit, in fresh allocations; Parameter objects stay the same.

    A policy with adapters takes adapters alone, trained on the base that it has; one without takes them merged. Raises
    CheckpointError if the directory is unreadable or of another model; the policy is then as it was.
    """
    new: list[tuple[dict[str, nn.Parameter], dict[str, Tensor]]] = []
    if policy.base is None:
        lm, _ = pretrained.read(str(directory / "policy"))
        new.append((dict(policy.lm.named_parameters()), dict(lm.named_parameters())))
    else:
        new.append((_trained(policy.lm), lora.stored(policy.lm, directory / "policy", policy.base)))
    if policy.value is not None:
        if lora.has_adapters(policy.value):
            new.append((_trained(policy.value), _value_tensors(directory / CRITIC / TRAINED_FILE)))
        else:
            new.append((dict(policy.value.named_parameters()), _value_tensors(directory / VALUE_FILE)))
    for parameters, tensors in new:
        _check_same(parameters, tensors, directory)
    for parameters, tensors in new:
        _put(parameters, tensors)


def reference(policy: Policy, *, moves: bool = False) -> Policy:
    """A frozen policy equal to this one as it was loaded, without value function.

    Of a policy with adapters it is the base without them, its parameters the same objects; only one that `moves` away
    from there, as a synchronised reference does, has a copy of its own.
    """
    lm = policy.lm if policy.base is None else lora.without_adapters(policy.lm)
    if moves:
        lm = copy.deepcopy(lm)
    elif policy.base is None:
        lm = copy.deepcopy(lm, _narrowed(lm) if policy.precision == "bfloat16" else {})
    return Policy(lm, None, precision=policy.precision).requires_grad_(False).eval()


def _narrowed(lm: Any) -> dict[int, object]:
    """A memo for deepcopy by which the matrices that only ever multiply in bfloat16 are copied in that type.

    What a product sees is the same to the bit; a frozen copy takes half the memory and need not be converted again.
    """
    trunk = Trunk.of(lm.base_model)
    matrices = [each.weight for layer in trunk.layers for each in layer.matrices] if trunk is not None else []
    return {id(each): nn.Parameter(each.detach().to(torch.bfloat16), requires_grad=False) for each in matrices}


def fingerprint(policy: Policy) -> str:
    """A sha256 of the language model's weights and their names; of those under the adapters, where there are some."""
    return lora.fingerprint(policy.lm) if policy.base is None else policy.base.sha256


def _lasting(model: ModelSection) -> str | None:
    """Where others find the model as it is now: a directory of its own or the hub. A run's checkpoints come and go."""
    if isinstance(model, ScratchModel) or model.path.endswith(".gguf"):
        return None
    place = Path(model.path).expanduser()
    if not place.exists():
        return model.path  # a hub id
    whole = (place / "config.json").is_file() and not (place / ADAPTER_CONFIG).is_file()
    return str(place.resolve()) if whole and not (place.parent / "state.json").is_file() else None


def _language_model(model: ModelSection, seed: int) -> tuple[Any, Any]:
    if isinstance(model, ScratchModel):
        tokenizer = scratch.tokenizer(model)
        return pretrained.settled(scratch.language_model(model, len(tokenizer), seed)), tokenizer
    if model.path.endswith(".gguf"):
        from mrlm_cli.policy import gguf

        return gguf.read(Path(model.path))
    return pretrained.read(model.path)


def _value(section: Value, lm: Any, width: int, seed: int, *, shares: bool) -> ValueHead | Critic:
    """The value function; where the trunk under it is never trained, it `shares` the policy's parameters."""
    head = ValueHead(width, section.head, section.init, scratch.generator(seed, "value"))
    if section.type == "shared":
        return head
    if section.path is None:
        trunk = lora.without_adapters(lm.base_model) if shares else copy.deepcopy(lm.base_model)
        return Critic(trunk, head)
    place = Path(section.path).expanduser()
    home = model_directory(place).parent if place.is_dir() else place
    if (home / CRITIC / "config.json").is_file():
        critic_lm = pretrained.untrained(home / CRITIC)  # the weights are in the file of values
    else:
        critic_lm, _ = pretrained.read(section.path)
    critic_width = int(critic_lm.get_input_embeddings().weight.shape[1])
    if critic_lm.get_input_embeddings().weight.shape[0] != lm.get_input_embeddings().weight.shape[0]:
        raise UserError(f"the critic of {section.path} has another vocabulary than the policy")
    critic = Critic(
        critic_lm.base_model, ValueHead(critic_width, section.head, section.init, scratch.generator(seed, "value"))
    )
    stored = home / VALUE_FILE
    if stored.is_file():
        tensors = _value_tensors(stored)
        target: nn.Module = critic if "head.last.weight" in tensors else critic.head
        _check_same(dict(target.named_parameters()), tensors, stored)
        _put(dict(target.named_parameters()), tensors)
    return critic


def _check_head(policy: Policy) -> None:
    """Refuse a family whose own forward does more between trunk and logits than `Policy.head` knows."""
    tokens = (torch.arange(8) % policy.vocabulary)[None]
    with torch.no_grad():
        try:
            expected = policy.lm(input_ids=tokens, use_cache=False).logits[0]
            made = policy.head(policy.lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0])
            same = torch.allclose(made, expected, rtol=1e-4, atol=1e-4)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            same = False
    if not same:
        kind = getattr(policy.lm.config, "model_type", "unknown")
        raise UserError(f"models of type {kind} are not supported: their logits are made in a way mrlm does not know")


def _value_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the value function in {file} cannot be read: {error}") from error


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)


def _check_same(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], place: Path) -> None:
    for name in sorted({*parameters, *tensors}):
        if name not in tensors:
            raise CheckpointError(f"{place} is of another model: it has no {name}")
        if name not in parameters:
            raise CheckpointError(f"{place} is of another model: {name} is not in this one")
        if parameters[name].shape != tensors[name].shape:
            here, there = list(parameters[name].shape), list(tensors[name].shape)
            raise CheckpointError(f"{place} is of another model: {name} is {there} there and {here} here")


def _put(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        source = tensors[name].detach()
        parameter.data = source.to(parameter.device, parameter.dtype, copy=True).contiguous()
