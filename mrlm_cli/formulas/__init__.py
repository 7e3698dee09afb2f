"""The mathematics: pure functions on tensors. Modules load on first use: importing the package imports no torch.

from mrlm_cli import formulas
formulas.losses.clipped_surrogate(...)      # torch is imported here
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mrlm_cli.formulas import advantages, groups, kl, losses, preferences, weights

__all__ = ["advantages", "groups", "kl", "losses", "preferences", "weights"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return __all__
