"""What makes episodes: the policy, and either its engine and the environments or a dataset.

Training and `mrlm eval` stand on the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from mrlm_cli import registry
from mrlm_cli.data import load as data
from mrlm_cli.engines.base import Engine
from mrlm_cli.envs.host import Host, Journal
from mrlm_cli.errors import UserError
from mrlm_cli.kernels import native
from mrlm_cli.kernels.llama import Trunk
from mrlm_cli.policy import load
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.recipe.sections import ModelSection
from mrlm_cli.rewards.firewall import ScoreJournal, Scorers
from mrlm_cli.training import agents, questions
from mrlm_cli.training.agents import Frozen
from mrlm_cli.training.machine import default_threads, keep_memory
from mrlm_cli.training.rollout import Rollout


def settled(recipe: Recipe, folders: Sequence[Path] = ()) -> Recipe:
    """The recipe with what depends on machine and data said outright: threads, device, kernels, steps of its epochs.

    Raises UserError where CUDA is asked for and there is none, and for bad rows where epochs are asked for.
    """
    if recipe.data is not None and recipe.data.epochs is not None:
        steps = data.of(recipe.data, folders).steps(recipe.data.epochs, recipe.data.rows_per_step)
        recipe = recipe.model_copy(update={"steps": steps, "data": recipe.data.model_copy(update={"epochs": None})})
    device = recipe.hardware.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("hardware.device is cuda, and torch sees no CUDA device; use cpu or auto")
    in_c = recipe.hardware.native
    if in_c is None:
        in_c = device == "cpu" and native.missing() is None
    hardware = recipe.hardware.model_copy(
        update={"threads": recipe.hardware.threads or default_threads(), "device": device, "native": in_c}
    )
    return recipe.model_copy(update={"hardware": hardware})


class RunJournal(Journal, ScoreJournal, Protocol):
    """What clocks decided, of environments and of rewards."""


class Stage:
    """Built from a settled recipe. A context manager: leaving it ends the environments' worker processes.

    `start` is the model from which the run started, by default the recipe's own; a frozen agent may be that one.
    A recipe with data has no environments, and an engine that is never loaded. Raises UserError for bad rows.
    """

    def __init__(
        self,
        recipe: Recipe,
        folders: Sequence[Path],
        *,
        journal: RunJournal,
        check: Callable[[], None],
        phase: Callable[[str, int, int], None],
        values: bool = True,
        start: ModelSection | None = None,
    ) -> None:
        self._hardware = hardware = recipe.hardware
        assert hardware.threads is not None
        torch.set_num_threads(hardware.threads)
        keep_memory()
        native.use(bool(hardware.native))
        if hardware.native and (reason := native.missing()):
            raise UserError(
                f"hardware.native is true, and the kernels in C cannot be compiled here: {reason}; "
                "hardware.native=false (in a run's recipe.yaml, for a resume) goes without, in other bits"
            )
        self._sampling = recipe.sampling
        self._budget = recipe.optimizer.tokens_per_micro_batch
        self._phase = phase
        algorithm = registry.resolve("algorithms", recipe.algorithm.type, folders)
        self.loaded = None if recipe.data is None else data.of(recipe.data, folders)
        self.policy, self.chat = load.build(
            recipe.model,
            seed=recipe.seed,
            device=hardware.device,
            precision=hardware.precision,
            gradient_checkpointing=hardware.gradient_checkpointing,
            values=values and algorithm(recipe.algorithm).needs.values,
        )
        self.engine: Engine = registry.resolve("engines", recipe.engine.type, folders)(
            recipe.engine, decode=self.chat.decode, precision=hardware.precision, check=check
        )

        self._others = agents.others(recipe, start or recipe.model, folders, check)
        self.frozen = {role: one.policy for role, one in self._others.items() if isinstance(one, Frozen)}

        def watched() -> None:
            check()
            if awaited := self.host.waiting() or self.players.waiting() or self.scorers.waiting():
                phase(f"waiting for {awaited}", 0, 0)

        self.host = Host(
            recipe.environments,
            folders=folders,
            workers=hardware.worker_processes,
            deadline=hardware.deadline,
            journal=journal,
            check=watched,
        )
        self.environments = self.host.environments
        self.players = Host(
            agents.players(recipe, self._others, self.environments, folders),
            folders=folders,
            workers=hardware.worker_processes,
            deadline=hardware.deadline,
            journal=journal,
            check=watched,
        )
        self.scorers = Scorers(
            recipe.rewards, folders=folders, workers=hardware.worker_processes, journal=journal, check=watched
        )

    def warnings(self) -> list[str]:
        """What makes it slow on this machine, a sentence each."""
        found = []
        if not self._hardware.native and (reason := native.refused()):
            found.append(f"torch's operators do the work of the kernels in C, which cannot be had: {reason}")
        narrow = self._hardware.device == "cpu" and self._hardware.precision == "bfloat16"
        if narrow and not native.multiplies_bfloat16() and Trunk.of(self.policy.lm.base_model) is None:
            found.append(
                "this model's products are torch's, which has no fast ones of bfloat16 here: "
                "with hardware.precision=float32 a step is several times faster"
            )
        return found

    def rollout(self, *, bootstrap: bool) -> Rollout:
        """Episodes by this policy; with `bootstrap`, a cut reply is left unscored."""
        return Rollout(
            self.host,
            self.engine,
            self.chat,
            self._sampling,
            bootstrap=bootstrap,
            phase=self._phase,
            others=self._others,
            players=self.players,
            scorers=self.scorers,
        )

    def findings(self) -> dict[str, float]:
        """What the environments find out about the policy by asking it, at the sampling temperature of training."""
        temperature = self._sampling.temperature
        return questions.findings(
            self.environments, self.policy, self.chat, temperature=temperature, budget=self._budget
        )

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exception: object) -> None:
        self.scorers.shutdown()
        self.players.shutdown()
        self.host.shutdown()
