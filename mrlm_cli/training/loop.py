"""The story: episodes, batch, credit, update, report, evaluation, checkpoint."""

from __future__ import annotations

import gc
import resource
import sys
import time

import torch

from mrlm_cli.errors import Interrupted, ScoringError
from mrlm_cli.metrics import Sums
from mrlm_cli.records import Progress
from mrlm_cli.training.annotate import annotate, unsound_rows
from mrlm_cli.training.calibration import Calibration, Phase, phases
from mrlm_cli.training.collate import collate
from mrlm_cli.training.contention import Contention
from mrlm_cli.training.fitting import is_unfit
from mrlm_cli.training.source import RolloutSource
from mrlm_cli.training.stopping import Stopper, StopRequested
from mrlm_cli.training.summary import episode_metrics, stored
from mrlm_cli.training.trainer import Trainer
from mrlm_cli.training.update import Refused


def run(trainer: Trainer, stopper: Stopper) -> None:
    """Train from `trainer.step` to the recipe's `steps`. Step n means n updates done.

    A signal gives up the rollout under way (it is a function of weights and step, so a resume repeats it) or lets an
    update come to its end; then the state is saved and Interrupted is raised.
    """
    steps = trainer.recipe.steps
    saved = trainer.step if trainer.resumed else None
    threads = trainer.recipe.hardware.threads
    assert threads is not None
    contention, calibration = Contention(threads), Calibration(threads)
    gc.collect()
    gc.freeze()  # what lives by now lives on: the collector need not walk through torch's and transformers' objects
    try:
        trainer.refresh_engine()
        if trainer.evaluation_due() and not trainer.run.has_evaluation(trainer.step):
            trainer.evaluate()  # the untrained policy is evaluation 0
            if trainer.checkpoint_due():  # a signal came before this evaluation, which may have found the best step
                saved = trainer.save()
        while trainer.step < steps:
            done = iteration(trainer)
            trainer.end_if_given_up()
            if disturbed := calibration.look(trainer.step, done) or contention.look():
                trainer.announce.warned(disturbed)
            if trainer.evaluation_due():
                trainer.evaluate()  # before the checkpoint: it decides which one is the best
            if trainer.checkpoint_due():
                saved = trainer.save()
            if trainer.step < steps:
                stopper.check()
            else:
                trainer.note_left_out()
    except StopRequested:
        if saved != trainer.step:
            trainer.save()
        number = stopper.signal_number
        assert number is not None
        raise Interrupted(
            number, f"stopped after step {trainer.step} of {steps}, saved; go on with: mrlm resume {trainer.run.path}"
        ) from None
    except ScoringError:
        if saved != trainer.step:
            trainer.save()
        raise
    trainer.announce.finished(trainer.step)


def iteration(trainer: Trainer) -> list[Phase]:
    """One rollout and its update; returns what its phases took.

    Raises StopRequested, with nothing changed, if a signal comes during the rollout, UserError if nothing fits the
    limits.
    """
    recipe, algorithm, announce = trainer.recipe, trainer.algorithm, trainer.announce
    progress = Progress(trainer.step, recipe.steps)
    sums = Sums()
    begun, decoded = time.perf_counter(), decoding_seconds(trainer)
    cursor = trainer.source.state()
    try:
        episodes = trainer.source.episodes(trainer.step)
    except (StopRequested, ScoringError):
        trainer.source.load_state(cursor)
        raise
    sampled = time.perf_counter()
    trainer.note_unfit(episodes)
    trainer.note_unknown(episodes)
    sums.update(episode_metrics(episodes, trainer.environments))
    needs = trainer.needs
    batch = collate(episodes, recipe.hardware.device, pairs=needs.pairs, observed=needs.observed)
    scored = sampled
    if batch is None and any(one.left_out is not None for one in episodes):
        sums.add("skipped_steps", recipe.optimizer.passes * recipe.optimizer.minibatches)
    elif batch is None:
        announce.warned(f"step {trainer.step + 1}: no episode can be trained on; the first: {episodes[0].failure}")
        why = "no prompt or row fits" if all(is_unfit(one) for one in episodes) else "every episode failed"
        trainer.updater.refuse(Refused(why, []))
        sums.add("skipped_steps", recipe.optimizer.passes * recipe.optimizer.minibatches)
    else:
        trainer.release_engine()
        if trainer.cached_reference is not None:
            batch = batch.replace(ref_logprobs=trainer.cached_reference.logprobs(batch, episodes))
        old_from = trainer.old_logprobs_from(episodes, progress)
        batch, gaps = annotate(
            batch,
            trainer.policy,
            trainer.reference,
            needs,
            temperature=recipe.sampling.temperature,
            budget=recipe.optimizer.tokens_per_micro_batch,
            phase=announce.phase,
            old_from=old_from,
        )
        if rows := unsound_rows(batch):
            trainer.updater.refuse(
                Refused("a reward, log-prob or value that is not finite", batch.episode[rows].tolist())
            )
            sums.add("refused_steps", recipe.optimizer.passes * recipe.optimizer.minibatches)
        else:
            sums.update(gaps)
            batch, credited = algorithm.credit(batch, progress)
            sums.update(credited)
            scored = time.perf_counter()
            sums.update(trainer.updater.update(batch, progress, measures_gap=needs.old and old_from != "scoring"))
        trainer.refresh_engine()
    wait_for_device()
    ended = time.perf_counter()
    trainer.step += 1
    if algorithm.needs.sync is not None:
        sums.add("reference_synced", float(trainer.sync_reference()))
    metrics = sums.means()
    trainer.note_gap(metrics)
    metrics |= {
        "seconds": ended - begun,
        "rollout_seconds": sampled - begun,
        "scoring_seconds": scored - sampled,
        "update_seconds": ended - scored,
        "tokens_per_second": metrics["sampled_tokens"] / (ended - begun),
        "memory_mb": peak_memory_mb(),
    }
    if trainer.step in (1, recipe.steps) or trainer.step % recipe.report.episodes_every == 0:
        trainer.run.write_episodes(trainer.step, stored(episodes, recipe.report.episodes))
    trainer.run.append_metrics(trainer.step, metrics)
    announce.stepped(trainer.step, metrics, episodes)
    return phases(
        episodes,
        decoding_seconds(trainer) - decoded,
        ended - scored,
        int(metrics.get("optimizer_steps", 0)),
        algorithm.value_only(progress),
    )


def decoding_seconds(trainer: Trainer) -> float:
    """Seconds in which the engine made the episodes of all steps so far; 0 for rows of a dataset."""
    return trainer.source.decoding_seconds if isinstance(trainer.source, RolloutSource) else 0.0


def wait_for_device() -> None:
    """Let a GPU finish what it was given, so that the update's last kernels are not timed as the next rollout."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory_mb() -> float:
    """Peak memory so far in MiB: of the GPU where one is used, else the process's resident set."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
