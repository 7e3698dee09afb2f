"""The base of every settings class: unknown keys are errors, values are frozen, numbers are finite and typed."""

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
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )
