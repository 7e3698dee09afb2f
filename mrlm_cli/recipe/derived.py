"""Numbers that follow from a recipe, without building anything and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mrlm_cli import registry
from mrlm_cli.recipe import shape
from mrlm_cli.recipe.agents import Frozen, Learner
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.recipe.sections import PretrainedModel
from mrlm_cli.recipe.shape import Shape

if TYPE_CHECKING:
    from mrlm_cli.algorithms.base import Needs

MIB = 2**20
_PROCESS = 450 * MIB  # Python, torch and transformers before a model, measured on CPU
_CHUNK_LOGITS = 2**25  # logits held at once by a scoring pass, a rule of kernels.logprobs


@dataclass(frozen=True, slots=True)
class Derived:
    """What `mrlm show` adds to a recipe. None: not to be known without the files of the model, or of the data."""

    episodes_per_step: int
    optimizer_steps_per_iteration: int
    optimizer_steps: int | None
    chosen_tokens_per_step_at_most: int | None
    tokens_per_step_at_most: int | None
    policy_parameters: int | None
    trained_parameters: int | None  # of the policy and the value function
    value_parameters: int | None
    memory_estimate_mib: int | None


def derive(recipe: Recipe, folders: Sequence[Path] = ()) -> Derived:
    """The numbers; `folders` are where a plugin's file lies. Raises CheckpointError for unreadable model files."""
    sampling, optimizer = recipe.sampling, recipe.optimizer
    episodes = recipe.episodes_per_step * _learners(recipe, folders)
    found = shape.of(recipe.model)
    limit = sampling.max_tokens if recipe.data is None else recipe.data.max_tokens
    longest = limit if found is None or found.context is None else found.context
    if longest is not None and limit is not None:
        longest = min(longest, limit)
    chosen = sampling.max_new_tokens * _turns(recipe, folders) if recipe.data is None else longest
    if longest is not None and chosen is not None:
        chosen = min(chosen, longest - 1)  # a prompt has at least one token
    needs = registry.resolve("algorithms", recipe.algorithm.type, folders)(recipe.algorithm).needs
    value = None if found is None else shape.value_parameters(recipe.model, found) if needs.values else 0
    memory = policy = trained = None
    if found is not None and value is not None:
        policy = found.parameters + shape.adapter_parameters(recipe.model, found)
        trained = shape.trained_parameters(recipe.model, found, values=needs.values)
        if longest is not None:
            memory = round(_memory(recipe, found, needs, longest, episodes) / MIB)
    steps = optimizer.passes * optimizer.minibatches
    sampled = episodes * (1 + sampling.refills) if recipe.algorithm.leaves_groups_out else episodes
    return Derived(
        episodes_per_step=episodes,
        optimizer_steps_per_iteration=steps,
        optimizer_steps=steps * recipe.steps or None,
        chosen_tokens_per_step_at_most=None if chosen is None else sampled * chosen,
        tokens_per_step_at_most=None if longest is None else sampled * longest,
        policy_parameters=policy,
        trained_parameters=trained,
        value_parameters=value,
        memory_estimate_mib=memory,
    )


def _learners(recipe: Recipe, folders: Sequence[Path]) -> int:
    """Episodes that a session makes: one for each role that learns; the most where environments differ."""
    others = {role for role, agent in recipe.agents.items() if not isinstance(agent, Learner)}
    roles = [registry.resolve("environments", each.type, folders).roles(each) for each in recipe.environments]
    return max((sum(role not in others for role in names) for names in roles), default=1)


def _turns(recipe: Recipe, folders: Sequence[Path]) -> int:
    """Replies that a session may ask for, at most."""
    kinds = [registry.resolve("environments", each.type, folders) for each in recipe.environments]
    single = all(vars(kind).get("single_reply", False) for kind in kinds)
    return 1 if single else recipe.sampling.max_turns


def _frozen(recipe: Recipe, found: Shape) -> int:
    """Parameters of all frozen agents' models whose files are here."""
    paths = {agent.path for agent in recipe.agents.values() if isinstance(agent, Frozen)}
    shapes = [
        found if path is None else shape.of(PretrainedModel(type="pretrained", path=path))
        for path in sorted(paths, key=str)
    ]
    return sum(each.parameters for each in shapes if each is not None)


def _memory(recipe: Recipe, found: Shape, needs: Needs, longest: int, episodes: int) -> float:
    """Bytes at the peak of an iteration: process, weights, gradients, Adam, activations, logits, keys and values.

    An estimate, good to a factor of two: what an allocator keeps and a kernel borrows is not counted, nor a single
    episode longer than a micro-batch. Cached episodes are taken to be as long as they may be.
    """
    number = 2 if recipe.hardware.precision == "bfloat16" else 4
    model, critic = recipe.model, needs.values and recipe.model.value.type == "separate"
    held = trained = shape.trained_parameters(model, found, values=needs.values)
    reference = needs.reference
    if model.lora is not None:  # one frozen base under policy, reference and critic, unless one has its own
        held += found.parameters + (found.parameters if critic and model.value.path is not None else 0)
        reference = needs.reference and needs.sync is not None
    weights = held * 4 + trained * (4 + 8)  # fp32 masters; gradients and two Adam moments
    narrowed = 2 if number == 2 else 0  # an engine decodes with a copy in bfloat16
    copies = found.parameters * narrowed + _frozen(recipe, found) * (4 + narrowed)
    if reference:
        copies += shape.reference_bytes(found, recipe.hardware.precision, moves=needs.sync is not None)
    tokens = recipe.optimizer.tokens_per_micro_batch
    layer = (8 * found.hidden + 2 * found.key_width + 4 * found.mlp) * number  # kept for the backward pass
    layers = (
        found.hidden * number * found.layers + layer if recipe.hardware.gradient_checkpointing else layer * found.layers
    )
    trunks = 2 if critic else 1
    logits = 2 * 4 * min(tokens * found.vocabulary, _CHUNK_LOGITS)  # themselves and their gradient
    cached = (
        0 if recipe.data is not None else min(episodes * longest, getattr(recipe.engine, "max_cached_tokens", 2**63))
    )
    keys = cached * found.layers * 2 * found.key_width * number
    return _PROCESS + weights + copies + max(tokens * layers * trunks + logits, keys)
