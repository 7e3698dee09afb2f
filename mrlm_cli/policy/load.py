"""Policies from a recipe's model section, and to and from checkpoint directories.

directory/policy/             config, weights in safetensors, tokenizer: loads in plain transformers
directory/value.safetensors   the value head, or the critic whole; absent without a value function
directory/critic/             the configuration of a critic's trunk, which may be another than the policy's
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mrlm_cli.errors import CheckpointError, UserError
from mrlm_cli.policy import pretrained, scratch
from mrlm_cli.policy.chat import Chat
from mrlm_cli.policy.model import Policy
from mrlm_cli.policy.pretrained import model_directory
from mrlm_cli.policy.trunk import checkpoint_activations
from mrlm_cli.policy.value import Critic, ValueHead
from mrlm_cli.recipe.sections import ModelSection, ScratchModel, Value

__all__ = ["build", "fingerprint", "load_weights", "model_directory", "reference", "save"]

VALUE_FILE = "value.safetensors"
CRITIC = "critic"


def build(
    model: ModelSection, *, seed: int, device: str, precision: str, gradient_checkpointing: bool, values: bool = True
) -> tuple[Policy, Chat]:
    """The policy, with its value function where `values`, and the door to its tokens.

    What is random (a scratch model, a value head) depends on `seed` alone; the global random state is left as it was.
    Weights are fp32 in allocations of their own. Raises UserError for a model that is not there or of an unsupported
    kind, CheckpointError for one that cannot be read, MissingExtra for a GGUF file without the extra.
    """
    lm, tokenizer = _language_model(model, seed)
    width = int(lm.get_input_embeddings().weight.shape[1])
    value = _value(model.value, lm, width, seed) if values else None
    policy = Policy(lm, value, precision=precision, trunk_gradient=model.value.trunk_gradient)
    _check_head(policy)
    if gradient_checkpointing:
        checkpoint_activations(lm)
        if isinstance(value, Critic):
            checkpoint_activations(value.trunk)
    policy.eval().to(device)
    context = getattr(lm.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return policy, Chat(tokenizer, model.chat, vocabulary=policy.vocabulary, context=int(context))


def save(policy: Policy, tokenizer: Any, directory: Path) -> None:
    """Write `directory/policy/` and, with a value function, `directory/value.safetensors`. Raises CheckpointError."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with pretrained.quiet():
            policy.lm.save_pretrained(directory / "policy")
            tokenizer.save_pretrained(directory / "policy")
        if policy.value is not None:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.value.named_parameters()}
            save_file(tensors, directory / VALUE_FILE)
        if isinstance(policy.value, Critic):
            config: Any = policy.value.trunk.config
            config.save_pretrained(directory / CRITIC)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the policy to {directory}: {error}") from error


def load_weights(policy: Policy, directory: Path) -> None:
    """Put the weights that `save` wrote back, bit for bit, in fresh allocations; Parameter objects stay the same.

    Raises CheckpointError if the directory is unreadable or of another model; the policy is then as it was.
    """
    lm, _ = pretrained.read(str(directory / "policy"))
    new = {"lm": dict(lm.named_parameters())}
    if policy.value is not None:
        new["value"] = _value_tensors(directory / VALUE_FILE)
    for part, tensors in new.items():
        _check_same(getattr(policy, part), tensors, directory)
    for part, tensors in new.items():
        _put(getattr(policy, part), tensors)


def reference(policy: Policy) -> Policy:
    """A frozen copy of the policy as it stands, without value function."""
    frozen = Policy(copy.deepcopy(policy.lm), None, precision=policy.precision)
    return frozen.requires_grad_(False).eval()


def fingerprint(policy: Policy) -> str:
    """A sha256 of the language model's weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.lm.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _language_model(model: ModelSection, seed: int) -> tuple[Any, Any]:
    if isinstance(model, ScratchModel):
        tokenizer = scratch.tokenizer(model)
        return pretrained.settled(scratch.language_model(model, len(tokenizer), seed)), tokenizer
    if model.path.endswith(".gguf"):
        from mrlm_cli.policy import gguf

        return gguf.read(Path(model.path))
    return pretrained.read(model.path)


def _value(section: Value, lm: Any, width: int, seed: int) -> ValueHead | Critic:
    head = ValueHead(width, section.head, section.init, scratch.generator(seed, "value"))
    if section.type == "shared":
        return head
    if section.path is None:
        trunk = copy.deepcopy(lm.base_model)
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
        _check_same(target, tensors, stored)
        _put(target, tensors)
    return critic


def _check_head(policy: Policy) -> None:
    """Refuse a family whose own forward does more between trunk and logits than `Policy.head` knows."""
    tokens = (torch.arange(8) % policy.vocabulary)[None]
    with torch.no_grad():
        try:
            expected = policy.lm(input_ids=tokens, use_cache=False).logits
            made = policy.head(policy.lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
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


def _check_same(module: nn.Module, tensors: dict[str, Tensor], place: Path) -> None:
    parameters = dict(module.named_parameters())
    for name in sorted({*parameters, *tensors}):
        if name not in tensors:
            raise CheckpointError(f"{place} is of another model: it has no {name}")
        if name not in parameters:
            raise CheckpointError(f"{place} is of another model: {name} is not in this one")
        if parameters[name].shape != tensors[name].shape:
            here, there = list(parameters[name].shape), list(tensors[name].shape)
            raise CheckpointError(f"{place} is of another model: {name} is {there} there and {here} here")


def _put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        source = tensors[name].detach()
        parameter.data = source.to(parameter.device, parameter.dtype, copy=True).contiguous()
