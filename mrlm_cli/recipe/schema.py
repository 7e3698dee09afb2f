"""A recipe: everything that a run depends on, strict and frozen.

The sections of environments, algorithm and engine are instances of the named class's own `Config`; `validate.py` makes
them. What several sections decide together is checked here.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field, SerializeAsAny, model_validator
from pydantic_core import PydanticCustomError

from mrlm_cli import registry
from mrlm_cli.recipe.agents import Agent
from mrlm_cli.recipe.sections import (
    Checkpoint,
    Evaluate,
    Hardware,
    ModelSection,
    Optimizer,
    PretrainedModel,
    Report,
    Sampling,
    ScratchModel,
)
from mrlm_cli.strict import AlgorithmSettings, EngineSettings, EnvironmentSettings, Strict

MODELS: dict[str, type[ScratchModel] | type[PretrainedModel]] = {
    "scratch": ScratchModel,
    "pretrained": PretrainedModel,
}
PLUGINS: dict[str, tuple[str, type[Strict]]] = {  # section -> kind in the registry, base of its Config
    "environments": ("environments", EnvironmentSettings),
    "algorithm": ("algorithms", AlgorithmSettings),
    "engine": ("engines", EngineSettings),
}


SAFE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$"


def _safe_name(name: str) -> str:
    if not re.fullmatch(SAFE_NAME, name):
        raise ValueError(
            f"got {name[:60]!r}; expected the name of a directory: up to 100 letters, digits, `.`, `_`, `-`, "
            "not beginning with `.` or `-`"
        )
    return name


class Head(Strict):
    """The settings that stand outside all sections."""

    name: Annotated[str, AfterValidator(_safe_name), Field(json_schema_extra={"pattern": SAFE_NAME})]
    """Name of the run directory under runs/: letters, digits, `.`, `_` and `-`, not beginning with `.` or `-`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """What every draw of the run is a function of."""
    steps: Annotated[int, Field(ge=1, le=1_000_000_000)]
    """Iterations of rollout and update; schedules run over them."""


def _default_engine() -> EngineSettings:
    config: EngineSettings = registry.resolve("engines", EngineSettings().type).Config()
    return config


class Recipe(Head):
    """One experiment, whole."""

    model: ModelSection
    """The policy and its value function."""
    environments: Annotated[tuple[SerializeAsAny[EnvironmentSettings], ...], Field(min_length=1, strict=False)]
    """What the policy learns from; tasks are shared out by `weight`."""
    agents: dict[str, Agent] = Field(default_factory=dict)
    """Who speaks for each role of environments with several; what is not named is the policy that learns."""
    sampling: Sampling = Sampling()
    """What one step draws."""
    algorithm: SerializeAsAny[AlgorithmSettings]
    """How episodes become a loss."""
    optimizer: Optimizer = Optimizer()
    """AdamW and the way an iteration is cut into optimizer steps."""
    evaluate: Evaluate = Evaluate()
    """Held-out evaluation."""
    checkpoint: Checkpoint = Checkpoint()
    """What is kept on disk to go on from."""
    hardware: Hardware = Hardware()
    """Where and how precisely to compute."""
    engine: SerializeAsAny[EngineSettings] = Field(default_factory=_default_engine)
    """What decodes; by default the cached engine."""
    report: Report = Report()
    """What is written down besides metrics."""

    @property
    def episodes_per_step(self) -> int:
        """Episodes sampled for one iteration."""
        return self.sampling.tasks_per_step * self.sampling.episodes_per_task

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        found = list(_contradictions(self))
        if found:
            text = "; ".join(f"{'.'.join(map(str, path))}: {what}" for path, what in found)
            raise PydanticCustomError("contradiction", "{text}", {"text": text, "found": found})
        return self


def _contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """(path, what is wrong) for each contradiction between sections."""
    seen: Counter[str] = Counter()
    for index, environment in enumerate(recipe.environments):
        seen[environment.label] += 1
        if seen[environment.label] > 1:
            yield ("environments", index), f"a second environment called {environment.label!r}; give it a `name`"
    sampling = recipe.sampling
    if recipe.algorithm.compares_episodes and sampling.episodes_per_task < 2:
        yield (
            ("sampling", "episodes_per_task"),
            f"got {sampling.episodes_per_task}; algorithm {recipe.algorithm.type} compares the episodes of a task: "
            "expected at least 2",
        )
    if isinstance(recipe.model, ScratchModel):
        context = recipe.model.context
        if sampling.max_tokens is not None and sampling.max_tokens > context:
            yield ("sampling", "max_tokens"), f"got {sampling.max_tokens}; expected at most model.context = {context}"
        elif sampling.max_tokens is None and sampling.max_new_tokens >= context:
            yield (
                ("sampling", "max_new_tokens"),
                f"got {sampling.max_new_tokens}; expected less than model.context = {context}, "
                "which holds the prompt too",
            )
    if sampling.max_tokens is not None and sampling.max_new_tokens >= sampling.max_tokens:
        yield (
            ("sampling", "max_new_tokens"),
            f"got {sampling.max_new_tokens}; expected less than max_tokens = {sampling.max_tokens}, "
            "which holds the prompt too",
        )
    if recipe.optimizer.minibatches > recipe.episodes_per_step:
        yield (
            ("optimizer", "minibatches"),
            f"got {recipe.optimizer.minibatches}; expected at most the {recipe.episodes_per_step} episodes of a step",
        )
