"""The base of every settings class: unknown keys are errors, values are frozen, numbers are finite and typed.

And what the settings of every environment, dataset, algorithm and engine share, so that a recipe can hold them unseen.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

# Strict mode would refuse a YAML list where a tuple is meant; only the container is relaxed, never its items.
Pair = Annotated[tuple[float, float], Field(strict=False)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class Names:
    """Stands beside a setting's type: its texts name something outside of the recipe, which `mrlm validate` looks for.

    A file; a function or class as ./file.py:name or package.module:name; a model by directory, run, checkpoint, .gguf
    file or hub id; a run of a reward model; a run or file of episodes; the words of a command. `besides` are texts that
    mean something else.
    """

    kind: Literal["file", "function", "model", "reward model", "episodes", "command"]
    besides: tuple[str, ...] = ()


class Strict(BaseModel):
    """A strict, frozen pydantic model.

    Booleans are not numbers, strings are not numbers, NaN and infinity are refused (an int is fine where a float is
    expected). The docstring under each field is its description.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    @property
    def needed_extras(self) -> tuple[str, ...]:
        """The extras of mrlm, as `math` in mrlm[math], without which what these settings describe cannot be made.

        Files and models that they name are looked at besides.
        """
        return ()


class EnvironmentSettings(Strict):
    """The settings that every environment has."""

    type: str
    """Name of the environment: a built-in one, an entry point, or ./file.py:Class."""
    name: str | None = None
    """Name in metrics and episodes; by default the type. Two environments of a recipe need two names."""
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Share of the tasks of a step, against the other environments' weights."""
    rewards: dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]] = {}
    """Weight of each declared reward component in the training reward; what is not named keeps its default."""
    max_failed: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of its last 256 sessions that may fail for technical reasons (of fewer than 32, as if they were 32); with
    more the run stops and says why."""

    @property
    def label(self) -> str:
        """The name under which the environment appears: `name`, or a file's class name, or the type."""
        return self.name or self.type.rpartition(":")[2]


class DataSettings(Strict):
    """The settings that every dataset has."""

    type: str
    """Name of the reader: jsonl, json, parquet, hub, episodes, or ./file.py:Class."""
    rows_per_step: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Rows in a step; a pair is one row."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Times the training rows are gone through, in place of `steps`; the last step is filled from the next epoch."""
    max_tokens: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    """Longest row in tokens; by default, and at most, the model's context. A longer row is left out, and counted."""
    validation_share: Annotated[float, Field(ge=0, le=0.45)] = 0.05
    """Share of the prompts that is held out, chosen by a hash, where no held-out data is named; 0 evaluates nothing."""
    test_share: Annotated[float, Field(ge=0, le=0.45)] | None = None
    """Share of the prompts kept for `mrlm eval` alone; by default as many as `validation_share` says."""
    bad_rows: Literal["error", "exclude"] = "error"
    """A row that cannot be used ends the run before it begins, or is left out, counted and named."""

    @property
    def pairs(self) -> bool:
        """Whether a row is a pair of answers, one preferred."""
        return False


class RewardSettings(Strict):
    """The settings that every reward has."""

    type: str
    """Name of the reward: a built-in one, an entry point, or ./file.py:Class."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,60}$")] | None = None
    """Name in metrics and failures; by default the type. Two rewards of a recipe need two names."""
    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """Its value times this is added to the training reward, on the agent's last chosen token."""
    low: Annotated[float, Field(ge=-1e6, le=1e6)] = -1.0
    """The least value that is sound; a session with one below counts as failed."""
    high: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """The greatest value that is sound; a session with one above counts as failed."""
    deadline: Annotated[float, Field(gt=0, le=86_400)] = 10.0
    """Seconds for one session; without an answer its process is killed and the session counts as failed."""
    max_failed: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the last 256 sessions that it may fail to score (of fewer than 32, as if they were 32), over steps and
    evaluations; with more the run stops and says why."""

    @property
    def label(self) -> str:
        """The name under which the reward appears: `name`, or a file's class name, or the type."""
        return self.name or self.type.rpartition(":")[2]


class AlgorithmSettings(Strict):
    """The settings that every algorithm has."""

    sources: ClassVar[tuple[Literal["rollouts", "data"], ...]] = ("rollouts",)  # what it can learn from
    pairs: ClassVar[bool] = False  # what it learns from is two episodes of one task, one preferred

    type: str
    """Name of the algorithm."""

    @property
    def compares_episodes(self) -> bool:
        """Whether the episodes of one task are compared with each other, which takes at least two of them."""
        return False

    @property
    def leaves_groups_out(self) -> bool:
        """Whether some groups are not trained on, so that a step may sample up to `sampling.refills` times more."""
        return False

    @property
    def clips_episodes(self) -> bool:
        """Whether the ratio that is clipped is a whole episode's: `clip_fraction` then counts episodes, and many
        of them without anything being wrong."""
        return False


class EngineSettings(Strict):
    """The settings that every engine has."""

    type: str = "cached"
    """Name of the engine: cached, or the slow obvious generate."""
