"""The base of every settings class: unknown keys are errors, values are frozen, numbers are finite and typed.

And what the settings of every environment, algorithm and engine share, so that a recipe can hold them unseen.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# Strict mode would refuse a YAML list where a tuple is meant; only the container is relaxed, never its items.
Pair = Annotated[tuple[float, float], Field(strict=False)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Schedule = Literal["constant", "linear", "cosine"]


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

    @property
    def label(self) -> str:
        """The name under which the environment appears: `name`, or a file's class name, or the type."""
        return self.name or self.type.rpartition(":")[2]


class AlgorithmSettings(Strict):
    """The settings that every algorithm has."""

    type: str
    """Name of the algorithm."""

    @property
    def compares_episodes(self) -> bool:
        """Whether the episodes of one task are compared with each other, which takes at least two of them."""
        return False


class EngineSettings(Strict):
    """The settings that every engine has."""

    type: str = "cached"
    """Name of the engine: cached, or the slow obvious generate."""
