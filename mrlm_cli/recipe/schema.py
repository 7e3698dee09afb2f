"""A recipe: everything that a run depends on, strict and frozen.

The sections of environments, algorithm and engine are instances of the named class's own `Config`; `validate.py` makes
them. What several sections decide together is checked here.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
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
from mrlm_cli.strict import AlgorithmSettings, DataSettings, EngineSettings, EnvironmentSettings, RewardSettings, Strict

MODELS: dict[str, type[ScratchModel] | type[PretrainedModel]] = {
    "scratch": ScratchModel,
    "pretrained": PretrainedModel,
}
PLUGINS: dict[str, tuple[str, type[Strict]]] = {  # section -> kind in the registry, base of its Config
    "environments": ("environments", EnvironmentSettings),
    "data": ("data", DataSettings),
    "rewards": ("rewards", RewardSettings),
    "algorithm": ("algorithms", AlgorithmSettings),
    "engine": ("engines", EngineSettings),
}
LISTS = ("environments", "rewards")  # sections that are lists of typed ones


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
    steps: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    """Iterations of rollout and update, at least 1; schedules run over them. Left out where data.epochs says it."""


def _default_engine() -> EngineSettings:
    config: EngineSettings = registry.resolve("engines", EngineSettings().type).Config()
    return config


class Recipe(Head):
    """One experiment, whole."""

    model: ModelSection
    """The policy and its value function."""
    environments: Annotated[tuple[SerializeAsAny[EnvironmentSettings], ...], Field(strict=False)] = ()
    """What the policy learns from; tasks are shared out by `weight`. At least one, unless the algorithm takes data."""
    rewards: Annotated[tuple[SerializeAsAny[RewardSettings], ...], Field(strict=False)] = ()
    """What scores finished sessions, next to the environments' own components; added by `weight`."""
    agents: dict[str, Agent] = Field(default_factory=dict)
    """Who speaks for each role of environments with several; what is not named is the policy that learns."""
    data: SerializeAsAny[DataSettings] | None = None
    """Rows to learn from, for algorithms that take data instead of environments."""
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
    def units_per_step(self) -> int:
        """What an iteration is made of and no minibatch splits: episodes, groups of them, or rows of data."""
        if self.data is not None:
            return self.data.rows_per_step
        return self.sampling.tasks_per_step if self.algorithm.pairs else self.episodes_per_step

    @property
    def episodes_per_step(self) -> int:
        """Episodes of one iteration."""
        if self.data is not None:
            return self.data.rows_per_step * (2 if self.data.pairs else 1)
        return self.sampling.tasks_per_step * self.sampling.episodes_per_task

    @model_serializer(mode="wrap")
    def _used(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the sections that the source of episodes makes meaningless: what is written loads back."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name not in _unused(self)}

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        found = list(_contradictions(self))
        if found:
            text = "; ".join(f"{'.'.join(map(str, path))}: {what}" for path, what in found)
            raise PydanticCustomError("contradiction", "{text}", {"text": text, "found": found})
        return self


def _unused(recipe: Recipe) -> tuple[str, ...]:
    """Sections that the recipe's source of episodes does not use."""
    return ("data",) if recipe.data is None else ("environments", "rewards", "agents", "sampling", "engine")


def _sources(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Whether the algorithm learns from what the recipe gives it."""
    kind, sources = recipe.algorithm.type, recipe.algorithm.sources
    if recipe.data is not None and "data" not in sources:
        yield ("data",), f"algorithm {kind} learns from environments and uses no data"
        return
    if recipe.data is None:
        if recipe.environments:
            if "rollouts" not in sources:
                yield ("environments",), f"algorithm {kind} learns from data and uses no environments"
        else:
            yield ("environments" if "rollouts" in sources else "data",), "required, and missing"
        return
    for name in _unused(recipe):
        if name in recipe.model_fields_set:
            yield (name,), f"algorithm {kind} on data uses no {name}"
    for name in ("episodes_per_task", "temperature"):
        if name in recipe.evaluate.model_fields_set and getattr(recipe.evaluate, name) != getattr(Evaluate(), name):
            yield ("evaluate", name), "held-out rows of data are not sampled"
    if recipe.algorithm.pairs != recipe.data.pairs:
        wanted_form = "pairs" if recipe.algorithm.pairs else "chat or completion"
        given = getattr(recipe.data, "form", recipe.data.type)
        yield ("data", "form"), f"got {given}; algorithm {kind} learns from form {wanted_form}"


def _contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """(path, what is wrong) for each contradiction between sections."""
    seen: Counter[str] = Counter()
    for index, environment in enumerate(recipe.environments):
        seen[environment.label] += 1
        if seen[environment.label] > 1:
            yield ("environments", index), f"a second environment called {environment.label!r}; give it a `name`"
        wall = getattr(getattr(environment, "sandbox", None), "wall_seconds", 0.0)
        if wall >= recipe.hardware.deadline:
            yield (
                ("environments", index, "sandbox", "wall_seconds"),
                f"got {wall:g}; expected less than hardware.deadline = {recipe.hardware.deadline:g}, "
                "or a slow program fails its session instead of being judged",
            )
        slow: list[tuple[tuple[str | int, ...], float]] = [
            (("mcp", number), each.deadline) for number, each in enumerate(getattr(environment, "mcp", ()))
        ]
        if getattr(environment, "functions", ()):
            slow.append((("deadline",), getattr(environment, "deadline", 0.0)))
        for place, seconds in slow:
            if seconds >= recipe.hardware.deadline:
                yield (
                    ("environments", index, *place),
                    f"deadline ({seconds:g}) must be below hardware.deadline = {recipe.hardware.deadline:g}, "
                    "or a late tool fails its session instead of being answered for",
                )
    named: Counter[str] = Counter()
    for index, reward in enumerate(recipe.rewards):
        named[reward.label] += 1
        if named[reward.label] > 1:
            yield ("rewards", index), f"a second reward called {reward.label!r}; give it a `name`"
        if reward.low >= reward.high:
            yield ("rewards", index), f"low ({reward.low:g}) must be below high ({reward.high:g})"
    epochs = None if recipe.data is None else recipe.data.epochs
    if recipe.steps == 0 and epochs is None:
        hint = "" if recipe.data is None else ", or data.epochs"
        yield ("steps",), f"got 0; expected a number of at least 1{hint}"
    if recipe.steps > 0 and epochs is not None:
        yield ("steps",), "steps and data.epochs exclude each other"
    yield from _sources(recipe)
    if recipe.optimizer.minibatches > recipe.units_per_step:
        unit = "rows" if recipe.data is not None else "tasks" if recipe.algorithm.pairs else "episodes"
        yield (
            ("optimizer", "minibatches"),
            f"got {recipe.optimizer.minibatches}; expected at most the {recipe.units_per_step} {unit} of a step",
        )
    if recipe.data is not None:
        yield from _data_limits(recipe, recipe.data)
        return
    sampling = recipe.sampling
    if recipe.algorithm.compares_episodes and sampling.episodes_per_task < 2:
        yield (
            ("sampling", "episodes_per_task"),
            f"got {sampling.episodes_per_task}; algorithm {recipe.algorithm.type} compares the episodes of a task: "
            "expected at least 2",
        )
    if sampling.refills != Sampling().refills and not recipe.algorithm.leaves_groups_out:
        yield (
            ("sampling", "refills"),
            f"got {sampling.refills}; algorithm {recipe.algorithm.type} as set leaves no task out, so none is sampled "
            "in its place; leave refills out, or set algorithm.filter_flat where there is one",
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


def _data_limits(recipe: Recipe, data: DataSettings) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(recipe.model, ScratchModel) and data.max_tokens is not None:
        context = recipe.model.context
        if data.max_tokens > context:
            yield ("data", "max_tokens"), f"got {data.max_tokens}; expected at most model.context = {context}"
