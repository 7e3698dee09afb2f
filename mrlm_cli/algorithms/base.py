"""What an algorithm is: which episodes to keep, how they are credited, what the loss of a micro-batch is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mrlm_cli.algorithms.settings import ReferenceSync
from mrlm_cli.metrics import Sums
from mrlm_cli.records import Batch, Episode, PolicyOut, Progress
from mrlm_cli.strict import AlgorithmSettings as AlgorithmSettings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Needs:
    """What the loop must provide to an algorithm."""

    values: bool  # a value function, and its values before the first update
    reference: bool  # log-probs of the reference: the policy as loaded, unless `sync` moves it
    sync: ReferenceSync | None = None  # how the reference follows the policy
    old: bool = True  # log-probs (and values, if needed at all) before the first update of an iteration
    credits_old: bool = True  # `credit` asks for old log-probs; else a single optimizer step may take its own
    logprobs: bool = True  # the LM head in the update
    entropy: bool = True  # entropies in the update
    observed: bool = False  # log-probs of observations too
    pairs: bool = False  # a unit is the episodes of a group that saw the same prompt; else it is one episode


class Algorithm(Protocol):
    """One instance a run. Every method sees the same on every rank."""

    needs: Needs
    bootstrap: bool  # truncated episodes are continued with V(tokens[:length]) instead of being scored as they stand

    def __init__(self, config: Any) -> None: ...

    def keep(self, group: Sequence[Episode]) -> str | None:
        """None to train on the episodes of one (task, agent), failed ones among them; else the reason why not."""

    def credit(self, batch: Batch, progress: Progress) -> tuple[Batch, Sums]:
        """Advantages, returns, weights and mass of the whole step's batch, on annotated log-probs and values."""

    def loss(self, out: PolicyOut, batch: Batch, progress: Progress) -> tuple[dict[str, torch.Tensor], Sums]:
        """SUMS over this micro-batch, undivided: `mass` will be divided by Σ mass, `tokens` by Σ chosen tokens."""

    def value_only(self, progress: Progress) -> bool:
        """True while only the value function is trained (value pretraining): no gradient may reach the policy."""

    def stop(self, metrics: dict[str, float]) -> bool:
        """After an optimizer step, with its metrics: True ends this iteration's update."""

    def state(self) -> dict[str, Any]:
        """What must survive a resume, JSON-able."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


@runtime_checkable
class Judged(Algorithm, Protocol):
    """An algorithm that learns from data and can therefore be judged on rows held out."""

    def judge(self, out: PolicyOut, batch: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """name -> (sum, count) of each unit [U], `loss` among them, on a credited batch; undivided."""


class Plain:
    """The common case: every group is kept, the policy trains throughout, no step ends the update, nothing is saved."""

    def keep(self, group: Sequence[Episode]) -> str | None:
        """Every group is kept."""
        return None

    def value_only(self, progress: Progress) -> bool:
        """Never."""
        return False

    def stop(self, metrics: dict[str, float]) -> bool:
        """Never."""
        return False

    def state(self) -> dict[str, Any]:
        """There is none."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""
