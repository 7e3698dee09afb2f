"""All that a run is made of, in one place: built once, saved and loaded whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mrlm_cli import registry
from mrlm_cli.algorithms.base import Algorithm
from mrlm_cli.errors import CheckpointError, NonFiniteError
from mrlm_cli.events import Evaluation
from mrlm_cli.policy import load, lora
from mrlm_cli.policy.model import Policy
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.records import Episode, Progress
from mrlm_cli.training import checkpoint
from mrlm_cli.training.annotate import OldFrom
from mrlm_cli.training.announce import Announcer
from mrlm_cli.training.collate import trainable
from mrlm_cli.training.dataset import DatasetSource
from mrlm_cli.training.evaluate import NothingToJudge, evaluate
from mrlm_cli.training.fitting import Fitting, is_unfit, nothing_fits
from mrlm_cli.training.held_out import evaluate_rows
from mrlm_cli.training.optim import Adam
from mrlm_cli.training.reference import CachedReference
from mrlm_cli.training.rundir import RunDirectory
from mrlm_cli.training.source import RolloutSource
from mrlm_cli.training.stage import Stage
from mrlm_cli.training.summary import stored, unknown_share
from mrlm_cli.training.update import Refused, Updater


class Trainer:
    """The parts of a run and its state: weights, optimizer, algorithm, source, step, best."""

    def __init__(
        self, recipe: Recipe, folders: Sequence[Path], stage: Stage, run: RunDirectory, announce: Announcer
    ) -> None:
        self.recipe = recipe
        self.run = run
        self.announce = announce
        self.policy = stage.policy
        self.engine = stage.engine
        self.environments = stage.environments
        self.step = 0
        self.resumed = False
        self.best: dict[str, float] | None = None  # of the steps evaluated and saved: {"step": n, "score": x}
        self._tokenizer = stage.chat.tokenizer
        self.fitting = Fitting(announce.warned)
        self._refusal = ""
        self._gap: float | None = None  # the largest between sampler and trainer, where it was measured last
        self.algorithm: Algorithm = registry.resolve("algorithms", recipe.algorithm.type, folders)(recipe.algorithm)
        # The policy as loaded, before a resume puts later weights in: KL at step 0 is 0.
        self.reference: Policy | None = (
            load.reference(self.policy, moves=self.algorithm.needs.sync is not None)
            if self.algorithm.needs.reference
            else None
        )
        self._reference_sha256 = load.fingerprint(self.policy) if self.reference is not None else None
        self._frozen_sha256 = {role: load.fingerprint(policy) for role, policy in stage.frozen.items()}
        self._rewards_sha256 = stage.scorers.fingerprints()
        self._judged = stage.rollout(bootstrap=False)
        self._findings = stage.findings
        self.needs = self.algorithm.needs
        self.source: RolloutSource | DatasetSource
        self.cached_reference: CachedReference | None = None
        if stage.loaded is None or recipe.data is None:
            self.needs = replace(self.needs, old=True)  # the gap between sampler and trainer is measured at every step
            self.source = RolloutSource(
                stage.rollout(bootstrap=self.algorithm.bootstrap),
                self.environments,
                recipe.sampling,
                recipe.seed,
                self.algorithm.keep,
            )
        else:
            for note in stage.loaded.notes():
                announce.warned(note)
            self.source = DatasetSource(stage.loaded, stage.chat, recipe.data, recipe.seed, announce.warned)
            if self.reference is not None:
                self.cached_reference = CachedReference(
                    self.reference, self.source, budget=recipe.optimizer.tokens_per_micro_batch
                )
        self._adam = Adam(self.policy, recipe.optimizer, recipe.model.value.lr)
        self.updater = Updater(
            self.policy,
            self.algorithm,
            self._adam,
            recipe.optimizer,
            temperature=recipe.sampling.temperature,
            seed=recipe.seed,
            phase=announce.phase,
            refused=self._refused,
        )

    def refresh_engine(self) -> None:
        """Give the engine the policy's weights, where it is the engine that makes episodes."""
        if isinstance(self.source, RolloutSource):
            self.engine.load(self.policy.lm)

    def release_engine(self) -> None:
        """Have the engine give its memory to scoring and update; `refresh_engine` comes before the next rollout."""
        if isinstance(self.source, RolloutSource):
            self.engine.release()

    def old_logprobs_from(self, episodes: Sequence[Episode], progress: Progress) -> OldFrom:
        """The cheapest source of old log-probs that is exact enough for this iteration.

        The update's own forward, if nothing asks before it, and after it nothing or the gap alone. The sampler's in
        float32, if they are of this very policy and the gap allows it; not while the update scores nothing to measure
        it on.
        """
        optimizer = self.recipe.optimizer
        once = optimizer.passes * optimizer.minibatches == 1 or not self.algorithm.needs.old  # else for the gap alone
        if once and not (self.needs.values or self.needs.credits_old):
            return "update"
        return "sampler" if self._reuses_logprobs(episodes, progress) else "scoring"

    def _reuses_logprobs(self, episodes: Sequence[Episode], progress: Progress) -> bool:
        limit = self.recipe.sampling.reuse_within
        if self.recipe.hardware.precision != "float32" or self._gap is None or self._gap > limit:
            return False
        if limit == 0 or self.recipe.data is not None or self.needs.observed or self.algorithm.value_only(progress):
            return False
        chosen = (span for one in episodes if trainable(one) for span in one.spans if span.kind == "chosen")
        return all(span.policy_step == self.step for span in chosen)

    def note_gap(self, metrics: Mapping[str, float]) -> None:
        """Remember the gap between sampler and trainer, if these metrics of a step hold it."""
        gap, limit = metrics.get("sampler_gap_max"), self.recipe.sampling.reuse_within
        if gap is None:
            return
        if (
            gap > limit > 0
            and (self._gap is None or self._gap <= limit)
            and self.recipe.hardware.precision == "float32"
        ):
            self.announce.warned(
                f"step {self.step}: a log-prob of the sampler is {gap:.2g} nats from the trainer's, more than "
                f"sampling.reuse_within = {limit:g}: the old ones are the trainer's until it is less"
            )
        self._gap = gap

    def note_unfit(self, episodes: Sequence[Episode]) -> None:
        """Warn of tasks of the step to come that do not fit. Raises UserError if nothing ever did."""
        if isinstance(self.source, RolloutSource):
            self.fitting.look("step", self.step + 1, episodes)
            if not self.fitting.any and self.step == 0:
                raise nothing_fits(episodes, None)
        elif all(is_unfit(one) for one in episodes) and not self.source.any_fits():
            raise nothing_fits(episodes, self.source.rows)

    def note_left_out(self) -> None:
        """Say, at the end, how many rows did not fit: only the first of them were named."""
        if isinstance(self.source, DatasetSource) and (told := self.source.left_out()):
            self.announce.warned(told)

    def note_unknown(self, episodes: Sequence[Episode]) -> None:
        """Warn, at the first step, of text that the tokenizer does not know: the policy cannot tell it apart."""
        share = unknown_share(episodes, self._tokenizer, said=self.recipe.data is not None) if self.step == 0 else 0.0
        if share > 0:
            self.announce.warned(
                f"step 1: {share:.1%} of the tokens that the policy is given are the unknown token of its tokenizer; a "
                "scratch model's model.characters must hold every character (tokenizer: bytes knows all)"
            )

    def evaluation_due(self) -> bool:
        """Whether the policy of this step is evaluated: the first, the last, and every so many."""
        every = self.recipe.evaluate.every
        if isinstance(self.source, DatasetSource) and not self.source.holds_out:
            return False
        return self.step in (0, self.recipe.steps) or (every > 0 and self.step % every == 0)

    def checkpoint_due(self) -> bool:
        """Whether this step is saved: the last, and every so many."""
        every = self.recipe.checkpoint.every
        return self.step > 0 and (self.step == self.recipe.steps or (every > 0 and self.step % every == 0))

    @torch.no_grad()
    def sync_reference(self) -> bool:
        """Move the reference towards the policy if this step is one at which it does; returns whether it did."""
        sync = self.algorithm.needs.sync
        if sync is None or self.reference is None or self.step % sync.every:
            return False
        policy = dict(lora.effective(self.policy.lm))
        for name, parameter in self.reference.lm.named_parameters():
            parameter.lerp_(policy[name], sync.rate)  # a rate of 1 gives the policy's bits
        return True

    def evaluate(self) -> None:
        """Evaluate on the validation split, store the result, and remember the best step.

        Where every episode failed there is no result: a warning, and the run goes on.
        """
        try:
            evaluation, episodes = self._evaluation()
        except NothingToJudge as error:
            self.announce.warned(f"evaluation at step {self.step}: {error}")
            return
        if isinstance(self.source, RolloutSource):
            self.fitting.look("evaluation at step", self.step, episodes)
        rows = stored(episodes, self.recipe.report.episodes)
        if self.checkpoint_due() and (self.best is None or evaluation.score > self.best["score"]):
            self.best = {"step": self.step, "score": evaluation.score}
        self.run.write_evaluation(self.step, {**asdict(evaluation), "episodes": rows})
        self.announce.evaluated(evaluation)

    def _evaluation(self) -> tuple[Evaluation, list[Episode]]:
        settings, place = self.recipe.evaluate, str(self.run.path)
        if isinstance(self.source, DatasetSource):
            rows = self.source.held_out(settings.tasks)
            return evaluate_rows(
                rows, self.policy, self.cached_reference, self.algorithm, self.recipe, self.step, place
            )
        return evaluate(
            self._judged,
            self.environments,
            settings,
            split="validation",
            seed=self.recipe.seed,
            step=self.step,
            checkpoint=place,
            findings=self._findings(),
        )

    def save(self) -> int:
        """Write a checkpoint of this step; returns the step."""

        def fill(directory: Path) -> None:
            load.save(self.policy, self._tokenizer, directory, base=base)
            self._adam.save(directory / "optimizer.safetensors")
            if self.reference is not None and self.algorithm.needs.sync is not None:
                load.save(self.reference, self._tokenizer, directory / "reference")
            (directory / "recipe.yaml").write_text(self.run.recipe_yaml(), encoding="utf-8")
            (directory / "state.json").write_text(json.dumps(self._state(), indent=1), encoding="utf-8")

        base = None
        if self.policy.base is not None and self.policy.base.path is None:
            base = str(self.run.keep_base(lambda place: load.save_base(self.policy, self._tokenizer, place)))
        parent = self.run.checkpoints
        path = checkpoint.write(parent, self.step, fill)
        if self.best is not None and self.best["step"] == self.step:
            checkpoint.mark_best(parent, self.step)
        checkpoint.prune(parent, self.recipe.checkpoint.keep)
        self.announce.saved(self.step, path)
        return self.step

    def load(self, directory: Path) -> None:
        """Take the state of a checkpoint; point `latest` and `best` at what it says, should a kill have come between.

        Raises CheckpointError if it belongs to another model or run.
        """
        state = checkpoint.state(directory)
        if state["reference_sha256"] not in (None, self._reference_sha256):
            raise CheckpointError(
                f"{directory}: the model from which the run started has changed since; its KL would be another"
            )
        if state["frozen_sha256"] != self._frozen_sha256:
            raise CheckpointError(
                f"{directory}: the model of a frozen agent has changed since; episodes would be others"
            )
        # What an older version saved holds neither the rewards' hashes nor the gap.
        rewards = state.get("rewards_sha256", self._rewards_sha256)
        if changed := sorted(set(rewards.items()) ^ set(self._rewards_sha256.items())):
            raise CheckpointError(
                f"{directory}: the model of the reward {changed[0][0]} has changed since; episodes would be scored "
                "otherwise. Name a checkpoint in its path, not a run that trains on"
            )
        load.load_weights(self.policy, directory)
        if self.reference is not None and self.algorithm.needs.sync is not None:
            load.load_weights(self.reference, directory / "reference")
        self._adam.load(directory / "optimizer.safetensors")
        self.step = int(state["step"])
        self.best = state["best"]
        self.algorithm.load_state(state["algorithm"])
        self.source.load_state(state["source"])
        self.updater.refused_in_a_row = int(state["refused_in_a_row"])
        self._gap = state.get("sampler_gap_max")
        self.resumed = True
        if self.recipe.hardware.device != "cpu":
            self.announce.warned(
                "a GPU adds up gradients in no fixed order: what follows is inexact, it has other bits than a run that "
                "was never interrupted"
            )
        checkpoint.mark_latest(directory.parent, self.step)
        if self.best is not None and (directory.parent / checkpoint.name(int(self.best["step"]))).is_dir():
            checkpoint.mark_best(directory.parent, int(self.best["step"]))

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "best": self.best,
            "algorithm": self.algorithm.state(),
            "source": self.source.state(),
            "refused_in_a_row": self.updater.refused_in_a_row,
            "sampler_gap_max": self._gap,
            "reference_sha256": self._reference_sha256,
            "frozen_sha256": self._frozen_sha256,
            "rewards_sha256": self._rewards_sha256,
        }

    def _refused(self, error: Refused) -> None:
        where = f"; episodes {', '.join(str(number) for number in error.episodes[:5])}" if error.episodes else ""
        self._refusal = f"step {self.step + 1}: {error}{where}; this optimizer step was not taken"
        self.announce.warned(self._refusal)

    def end_if_given_up(self) -> None:
        """After too many refusals in a row, save the untouched parameters and raise NonFiniteError.

        The refused step counts as done, so that a resume goes on behind it.
        """
        if self.updater.gave_up:
            count, self.updater.refused_in_a_row = self.updater.refused_in_a_row, 0
            self.save()
            raise NonFiniteError(
                f"{self._refusal}; {count} in a row, so the run stops, with step {self.step} saved. If episodes "
                "failed, the stored ones say why; if prompts do not fit, raise sampling.max_tokens; if something was "
                "not finite, lower optimizer.lr or max_grad_norm"
            )
