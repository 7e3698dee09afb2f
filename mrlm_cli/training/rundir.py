"""A run's directory: born whole, locked while a process trains in it, metrics of exactly the steps 1..n.

    runs/<name>/
      recipe.yaml  origin.json  machine.json   what ran, where each value came from, on what
      metrics.jsonl                            one flat line a step
      journal.jsonl                            what clocks and remote judges decided
      resumes.jsonl                            recipe changes of later resumes
      warnings.jsonl                           what a person was warned of, and when
      tracebacks.txt                           exceptions of people's own code, where there were some
      episodes/step-000040.jsonl  eval/step-000000.json  checkpoints/
      base/                                    what adapters stand on, where no other directory holds it

A step's line is on the disk before its checkpoint is. So after a kill the file holds at least the steps of every
checkpoint, and `rewind` to the one that is resumed leaves exactly its steps.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from mrlm_cli.errors import NonFiniteError, RunDirectoryError, UserError
from mrlm_cli.recipe import checkpoints
from mrlm_cli.training import durable
from mrlm_cli.training.journal import Journal

_FOLDERS = ("checkpoints", "episodes", "eval")
_REQUIRED = ("recipe.yaml", "origin.json", "metrics.jsonl", "checkpoints")
_STEP_FILE = re.compile(r"step-(\d{6,})(-\w+)?\.jsonl?")


class RunDirectory:
    """One run on disk. Made by `create` or `open`; writing needs the lock, reading does not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._metrics_path = path / "metrics.jsonl"
        self.replaced = False  # whether it took the place of a run that ended before its first step
        self._steps: int | None = None  # lines in metrics.jsonl; unknown until the first append
        self._born: int | None = None  # inode of the directory that `create` made

    @classmethod
    def create(
        cls, path: Path, *, recipe_yaml: str, origins: Mapping[str, Any], machine: Mapping[str, Any]
    ) -> RunDirectory:
        """A new run directory, built beside and renamed; a run of this name in which no step was done makes room.

        Raises UserError if the name is taken, RunDirectoryError if the place cannot be written or a process trains in
        it.
        """
        cls.refuse_existing(path)
        made = cls(path)
        building = durable.temporary(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.sweep(path.parent, durable.STALE_SECONDS, path.name)
            building.mkdir()
            for folder in _FOLDERS:
                (building / folder).mkdir()
            (building / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
            (building / "origin.json").write_bytes(durable.json_text(origins))
            (building / "machine.json").write_bytes(durable.json_text(machine))
            for empty in ("metrics.jsonl", "journal.jsonl"):
                (building / empty).touch()
            durable.sync_tree(building)
            made._born = building.stat().st_ino
            if os.path.lexists(path):
                made._replace_untrained(building)
            else:
                os.rename(building, path)
            durable.sync(path.parent)
        except OSError as error:
            durable.remove(building)
            if os.path.lexists(path):  # another process took the name meanwhile
                raise UserError(_taken(path)) from error
            raise RunDirectoryError(f"the run directory {path} could not be made: {error}") from error
        except BaseException:
            durable.remove(building)
            raise
        return made

    def _replace_untrained(self, building: Path) -> None:
        """Put `building` in the place of a run in which no step was done, under its lock."""
        old = RunDirectory(self.path)
        with old.lock():
            if not untrained(self.path):  # its process did a step before it left the lock
                raise UserError(_taken(self.path))
            aside = durable.temporary(self.path)
            os.rename(self.path, aside)
            os.rename(building, self.path)
        durable.remove(aside)
        self.replaced = True

    @staticmethod
    def refuse_existing(path: Path) -> None:
        """Raises UserError, with the command to go on, if the name is taken: by anything but a run without a step, and
        RunDirectoryError if a process is about to do one.
        """
        if not os.path.lexists(path):
            return
        if not untrained(path):
            raise UserError(_taken(path))
        with RunDirectory(path).lock():
            pass

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run directory. Raises UserError if there is none at `path`."""
        if not path.is_dir():
            beside = Path("runs") / path
            hint = f"did you mean {beside}?" if beside.is_dir() else "mrlm list runs names those that are there"
            raise UserError(f"there is no run directory {path}; {hint}")
        missing = [name for name in _REQUIRED if not (path / name).exists()]
        if missing:
            raise UserError(f"{path} is not a run directory: it has no {', '.join(missing)}")
        return cls(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. Raises RunDirectoryError if another one trains in it, or has put a run of its
        own in its place, or it is read-only.

        The lock ends with this process, however it ends: its file is closed on exec and in forked children.
        """
        _close_in_children()
        owner = os.getpid()
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunDirectoryError(f"{self.path} cannot be written: {error}") from error
        _held.add(descriptor)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {owner} on {socket.gethostname()}\n".encode(), 0)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                raise RunDirectoryError(f"{self.path} is in use: {holder} trains in it") from error
            except OSError as error:
                raise RunDirectoryError(f"{self.path} cannot be locked: {error}") from error
            if self._born is not None and self.path.stat().st_ino != self._born:
                raise RunDirectoryError(f"{self.path} was replaced by another process that began at the same moment")
            yield
        finally:
            if os.getpid() == owner:  # a forked child has closed its copy and must not end its parent's lock
                _held.discard(descriptor)
                os.close(descriptor)

    def keep_base(self, fill: Callable[[Path], None]) -> Path:
        """The absolute path of base/, what the run's adapters stand on; `fill(directory)` writes it if it is not there.

        Raises RunDirectoryError if the disk refuses.
        """
        target = (self.path / "base").resolve()
        if target.is_dir():
            return target
        building = durable.temporary(target)
        try:
            fill(building)
            durable.sync_tree(building)
            os.rename(building, target)
            durable.sync(target.parent)
        except OSError as error:
            durable.remove(building)
            raise RunDirectoryError(f"{target} could not be written: {error}") from error
        except BaseException:
            durable.remove(building)
            raise
        return target

    def recipe_yaml(self) -> str:
        """The text of recipe.yaml. Raises RunDirectoryError if it cannot be read."""
        try:
            return (self.path / "recipe.yaml").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirectoryError(f"{self.path / 'recipe.yaml'} cannot be read: {error}") from error

    def origin(self) -> dict[str, Any]:
        """What origin.json holds: `origins`, `folders`, `plugins`. Raises RunDirectoryError if it cannot be read."""
        path = self.path / "origin.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not {"origins", "folders", "plugins"} <= set(found):
                raise ValueError("it lacks origins, folders or plugins")
        except (OSError, ValueError, TypeError) as error:
            raise RunDirectoryError(f"{path} cannot be read: {error}") from error
        return dict(found)

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the line of `step`, which must be the one after the last; on the disk before this returns.

        Raises NonFiniteError for NaN or infinity (leave undefined metrics out), ValueError for a step out of turn,
        RunDirectoryError if the disk refuses.
        """
        if self._steps is None:
            self._steps = len(self.metrics())
        if step != self._steps + 1:
            raise ValueError(f"{self._metrics_path} ends at step {self._steps}; step {step} cannot follow")
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"metric {name} of step {step} is {value}")
        try:
            durable.append(self._metrics_path, durable.json_line({"step": step, **metrics}))
        except OSError as error:
            self._steps = None
            raise RunDirectoryError(f"{self._metrics_path} could not be written: {error}") from error
        self._steps = step

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, steps 1..n; a torn last line is left out.

        Raises RunDirectoryError if a line is not the next step's.
        """
        return self._parse(durable.whole_lines(self._metrics_path))

    def rewind(self, step: int) -> None:
        """Forget everything after `step`, as if the run had been stopped there; the journal is kept.

        Raises RunDirectoryError if metrics.jsonl does not hold the steps 1..step or the disk refuses.
        """
        kept = durable.whole_lines(self._metrics_path)[:step]
        self._parse(kept)
        if len(kept) < step:
            raise RunDirectoryError(f"{self._metrics_path} ends at step {len(kept)}; it cannot go on from step {step}")
        try:
            os.truncate(self._metrics_path, sum(len(line) + 1 for line in kept))
            durable.sync(self._metrics_path)
            durable.sweep(self.path, target="base")
            durable.sweep(self.path / "episodes")
            durable.sweep(self.path / "eval", durable.STALE_SECONDS)  # an evaluation may be writing without the lock
            for folder in ("episodes", "eval"):
                for path in (self.path / folder).iterdir():
                    match = _STEP_FILE.fullmatch(path.name)
                    if match is not None and int(match[1]) > step:
                        path.unlink()
                durable.sync(self.path / folder)
        except OSError as error:
            raise RunDirectoryError(f"{self.path} could not be set back to step {step}: {error}") from error
        self._steps = step

    def write_episodes(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the sample of a step's episodes. Raises RunDirectoryError if the disk refuses."""
        self._write(f"episodes/step-{step:06d}.jsonl", b"".join(durable.json_line(row) for row in rows))

    def write_evaluation(self, step: int, data: Mapping[str, Any]) -> None:
        """Write an evaluation; one on another split than validation gets the split in its name. Needs no lock.

        Raises RunDirectoryError if the disk refuses.
        """
        split = data.get("split", "validation")
        suffix = "" if split == "validation" else f"-{split}"
        self._write(f"eval/step-{step:06d}{suffix}.json", durable.json_text(data))

    def append_warning(self, text: str) -> None:
        """Add what a person was warned of. Raises RunDirectoryError if the disk refuses."""
        row = {"time": _now(), "text": text}
        try:
            durable.append(self.path / "warnings.jsonl", durable.json_line(row))
        except OSError as error:
            raise RunDirectoryError(f"{self.path / 'warnings.jsonl'} could not be written: {error}") from error

    def has_evaluation(self, step: int) -> bool:
        """Whether the validation split was evaluated at `step`."""
        return (self.path / f"eval/step-{step:06d}.json").is_file()

    @cached_property
    def journal(self) -> Journal:
        """What clocks and remote judges decided. Raises RunDirectoryError if it cannot be read."""
        return Journal(self.path / "journal.jsonl")

    def update_recipe(self, recipe_yaml: str, origins: Mapping[str, Any]) -> None:
        """Replace the recipe by one that a resume changed; what changed is added to resumes.jsonl first.

        Raises RunDirectoryError if the disk refuses.
        """
        old, new = _leaves(yaml.safe_load(self.recipe_yaml())), _leaves(yaml.safe_load(recipe_yaml))
        changed = {key: [old.get(key), new.get(key)] for key in sorted(old | new) if old.get(key) != new.get(key)}
        row = {
            "time": _now(),
            "command": shlex.join(sys.argv),
            "changed": changed,
        }
        try:
            durable.append(self.path / "resumes.jsonl", durable.json_line(row))
        except OSError as error:
            raise RunDirectoryError(f"{self.path / 'resumes.jsonl'} could not be written: {error}") from error
        self._write("recipe.yaml", recipe_yaml.encode())
        self._write("origin.json", durable.json_text(origins))

    def _parse(self, lines: Sequence[bytes]) -> list[dict[str, Any]]:
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or row.get("step") != number:
                raise RunDirectoryError(f"{self._metrics_path}:{number} is not the line of step {number}")
            rows.append(row)
        return rows

    def _write(self, relative: str, data: bytes) -> None:
        try:
            durable.write_whole(self.path / relative, data)
        except OSError as error:
            raise RunDirectoryError(f"{self.path / relative} could not be written: {error}") from error


def untrained(path: Path) -> bool:
    """Whether a run lies there in which no step was done: to begin it again loses nothing."""
    if not _is_run(path) or (path / "metrics.jsonl").stat().st_size > 0:
        return False
    return not checkpoints.trained(path / "checkpoints")


def latest_run(root: Path = Path("runs")) -> Path:
    """The run below `root` that wrote a step last (or was born last). Raises UserError if there is none."""
    found = [path.parent for path in root.glob("*/metrics.jsonl") if not path.parent.name.startswith(durable.TEMPORARY)]
    runs = [path for path in found if _is_run(path)]
    if not runs:
        raise UserError(f"there is no run in {root}/; start one with: mrlm train quickstart")
    return max(runs, key=lambda path: ((path / "metrics.jsonl").stat().st_mtime_ns, path.name))


_held: set[int] = set()  # descriptors of the locks that this process holds


@cache
def _close_in_children() -> None:
    """Close held locks in every forked child: a lock lives as long as any process has its file open."""

    def close_held() -> None:
        for descriptor in _held:
            os.close(descriptor)
        _held.clear()

    os.register_at_fork(after_in_child=close_held)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_run(path: Path) -> bool:
    return all((path / name).exists() for name in _REQUIRED)


def _taken(path: Path) -> str:
    if _is_run(path):
        going_on = f"go on with it: mrlm resume {shlex.quote(str(path))}"
        return f"the run {path} exists already; {going_on}, or begin another: name=… or --run-dir"
    return f"{path} exists already and is not a run directory; choose another name or --run-dir"


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """{"a.b.0": leaf} of a nested YAML value."""
    if isinstance(value, dict):
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {key: value}
    found: dict[str, Any] = {}
    for name, item in items:
        found |= _leaves(item, f"{key}.{name}" if key else name)
    return found
