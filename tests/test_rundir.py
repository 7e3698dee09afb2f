"""Run directories: born whole, locked, metrics of exactly the steps 1..n, journal, machine."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mrlm_cli.errors import NonFiniteError, RunDirectoryError, UserError
from mrlm_cli.training import machine
from mrlm_cli.training.rundir import RunDirectory, latest_run

RECIPE = "name: toy\nsteps: 40\nevaluate: {every: 10, tasks: 5}\nenvironments: [{type: guess, high: 8}]\n"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(
        tmp_path / "runs" / "toy", recipe_yaml=RECIPE, origins={"steps": "toy.yaml:2"}, machine={"threads": 2}
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_born_whole(run: RunDirectory) -> None:
    born = ["checkpoints", "episodes", "eval", "journal.jsonl", "machine.json", "metrics.jsonl"]
    assert names(run.path) == [*born, "origin.json", "recipe.yaml"]
    assert names(run.path.parent) == ["toy"]
    again = RunDirectory.open(run.path)
    assert again.recipe_yaml() == RECIPE
    assert again.metrics() == []
    assert json.loads((run.path / "origin.json").read_text()) == {"steps": "toy.yaml:2"}


def test_a_taken_name_is_refused_and_left_alone(run: RunDirectory, tmp_path: Path) -> None:
    before = (run.path / "recipe.yaml").read_text()
    run.append_metrics(1, {"reward": 0.5})
    with pytest.raises(UserError, match=f"exists already; go on with it: mrlm resume {run.path}"):
        RunDirectory.create(run.path, recipe_yaml="name: other\n", origins={}, machine={})
    assert (run.path / "recipe.yaml").read_text() == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(UserError, match="is not a run directory; choose another name"):
        RunDirectory.create(foreign, recipe_yaml=RECIPE, origins={}, machine={})
    assert names(foreign) == []


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run directory"):
        RunDirectory.open(tmp_path / "absent")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(UserError, match=r"not a run directory: it has no origin\.json, metrics\.jsonl, checkpoints"):
        RunDirectory.open(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(RunDirectoryError, match=r"could not be made.*File exists"):
        RunDirectory.create(blocked / "toy", recipe_yaml=RECIPE, origins={}, machine={})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunDirectoryError, match="No space left"):
            RunDirectory.create(tmp_path / "toy", recipe_yaml=RECIPE, origins={}, machine={})
    assert names(tmp_path) == ["file"]


def test_old_remains_of_the_same_name_are_swept_others_stay(tmp_path: Path) -> None:
    for name in (".tmp-toy-0123456789ab", ".tmp-toy-ffffffffffff", ".tmp-mine"):
        (tmp_path / name).mkdir()
    for name in (".tmp-toy-0123456789ab", ".tmp-mine"):
        os.utime(tmp_path / name, (0, 0))
    RunDirectory.create(tmp_path / "toy", recipe_yaml=RECIPE, origins={}, machine={})
    assert names(tmp_path) == [".tmp-mine", ".tmp-toy-ffffffffffff", "toy"]


def test_metrics_are_the_steps_in_order(run: RunDirectory) -> None:
    run.append_metrics(1, {"reward": 0.1, "episodes": 8})
    run.append_metrics(2, {"reward": 0.30000000000000004})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "reward": 0.1, "episodes": 8}', '{"step": 2, "reward": 0.30000000000000004}']
    assert RunDirectory.open(run.path).metrics()[1] == {"step": 2, "reward": 0.1 + 0.2}
    for wrong in (2, 4):
        with pytest.raises(ValueError, match=f"ends at step 2; step {wrong}"):
            run.append_metrics(wrong, {"reward": 0.0})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError, match="metric reward of step 3"):
            run.append_metrics(3, {"reward": bad})
    RunDirectory.open(run.path).append_metrics(3, {"reward": 1.0})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


def test_a_refused_write_leaves_the_lines_as_they_were(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run.append_metrics(1, {"reward": 0.1})
    before = (run.path / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl could not be written.*No space left"):
            run.append_metrics(2, {"reward": 0.2})
        with pytest.raises(RunDirectoryError, match="step-000002"):
            run.write_evaluation(2, {"split": "validation"})
    assert (run.path / "metrics.jsonl").read_bytes() == before
    assert names(run.path / "eval") == []
    run.append_metrics(2, {"reward": 0.2})
    assert len(run.metrics()) == 2


def test_rewind_forgets_what_lies_beyond_and_keeps_the_journal(run: RunDirectory) -> None:
    for step in range(1, 6):
        run.append_metrics(step, {"reward": step / 10})
        run.write_episodes(step, [{"tokens": [1, 2]}])
        run.write_evaluation(step, {"split": "validation", "step": step})
    run.write_evaluation(0, {"split": "validation", "step": 0})
    run.write_evaluation(4, {"split": "test", "step": 4})
    run.journal.record("s", 0, "late")
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "rew')  # torn by a kill
    (run.path / "episodes" / ".tmp-step-000006.jsonl-0123456789ab").write_text("half")
    again = RunDirectory.open(run.path)
    assert len(again.metrics()) == 5
    again.rewind(3)
    assert [row["step"] for row in again.metrics()] == [1, 2, 3]
    assert (run.path / "metrics.jsonl").read_bytes().endswith(b'{"step": 3, "reward": 0.3}\n')
    assert names(run.path / "episodes") == ["step-000001.jsonl", "step-000002.jsonl", "step-000003.jsonl"]
    assert names(run.path / "eval") == [f"step-00000{n}.json" for n in range(4)]
    assert again.journal.recall("s", 0) == "late"
    again.append_metrics(4, {"reward": 0.5})
    with pytest.raises(RunDirectoryError, match="ends at step 4; it cannot go on from step 9"):
        again.rewind(9)
    again.rewind(0)
    assert again.metrics() == []
    again.append_metrics(1, {"reward": 0.1})
    assert again.has_evaluation(0)
    assert not again.has_evaluation(1)


def test_broken_metrics_are_named(run: RunDirectory) -> None:
    path = run.path / "metrics.jsonl"
    for text in ('{"step": 2}\n', '{"step": 1}\n{"step": 1}\n', "nonsense\n"):
        path.write_text(text)
        with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl:[12] is not the line of step"):
            run.metrics()


def test_any_text_of_an_episode_survives(run: RunDirectory) -> None:
    hostile = "\x1b[31m\x00\u2028\n\ud800 é 数"
    run.write_episodes(1, [{"text": hostile}, {"text": "b"}])
    lines = (run.path / "episodes" / "step-000001.jsonl").read_bytes().decode("utf-8").split("\n")
    assert len(lines) == 3
    assert json.loads(lines[0]) == {"text": hostile}
    with pytest.raises(ValueError, match="JSON compliant"):
        run.write_episodes(2, [{"reward": float("nan")}])


def test_journal(run: RunDirectory) -> None:
    journal = run.journal
    assert journal.recall("a", 0) is None
    journal.record("a", 0, "no answer in 30 s")
    journal.record("a", 0, "no answer in 30 s")
    journal.record("a", 1, "gone")
    path = run.path / "journal.jsonl"
    assert path.read_bytes().count(b"\n") == 2
    with pytest.raises(ValueError, match="cannot fail as"):
        journal.record("a", 0, "other")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"session": "b", "tu')
    again = RunDirectory.open(run.path).journal
    assert again.recall("a", 0) == "no answer in 30 s"
    assert again.recall("b", 0) is None
    again.record("b", 0, "late")
    assert path.read_bytes() == whole + b'{"session": "b", "turn": 0, "failure": "late"}\n'
    path.write_bytes(b"{}\n")
    with pytest.raises(RunDirectoryError, match=r"journal\.jsonl:1 is not a line of a journal"):
        RunDirectory.open(run.path).journal.recall("a", 0)


def test_a_changed_recipe_is_recorded(run: RunDirectory) -> None:
    longer = RECIPE.replace("steps: 40", "steps: 60").replace("every: 10", "every: 20")
    run.update_recipe(longer, {"steps": "command line"})
    assert run.recipe_yaml() == longer
    assert json.loads((run.path / "origin.json").read_text()) == {"steps": "command line"}
    (row,) = map(json.loads, (run.path / "resumes.jsonl").read_text().splitlines())
    assert row["changed"] == {"steps": [40, 60], "evaluate.every": [10, 20]}
    assert row["command"]
    assert row["time"].endswith("+00:00")


def test_the_latest_run_is_the_one_that_wrote_last(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with pytest.raises(UserError, match="there is no run in"):
        latest_run(root)
    for index, name in enumerate(("a", "b", "c")):
        RunDirectory.create(root / name, recipe_yaml=RECIPE, origins={}, machine={})
        os.utime(root / name / "metrics.jsonl", (index, index))
    (root / "junk").mkdir()
    assert latest_run(root) == root / "c"
    RunDirectory.open(root / "a").append_metrics(1, {"reward": 0.0})
    assert latest_run(root) == root / "a"


HOLDER = """
import sys, time
from pathlib import Path
from mrlm_cli.training.rundir import RunDirectory
with RunDirectory.open(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_trainer_at_a_time_and_a_kill_frees_the_run(run: RunDirectory) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(RunDirectoryError, match=rf"in use: process {holder.pid} on .* trains in it"), run.lock():
        raise AssertionError("two trainers in one run")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    holder.stdin.close()
    with run.lock(), pytest.raises(RunDirectoryError, match="in use"), RunDirectory.open(run.path).lock():
        raise AssertionError("two trainers in one process")
    with run.lock():
        (run.path / "lock").read_text()


PARENT = """
import os, subprocess, sys, time
from pathlib import Path
from mrlm_cli.training.rundir import RunDirectory
with RunDirectory.open(Path(sys.argv[1])).lock():
    spawned = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], close_fds=False)
    forked = os.fork()
    if forked == 0:
        print(os.getppid(), os.getpid(), spawned.pid, flush=True)
        time.sleep(30)
        os._exit(0)
    time.sleep(30)
"""


def test_children_do_not_hold_the_lock_of_a_killed_parent(run: RunDirectory) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(run.path)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    _, *children = map(int, parent.stdout.readline().split())
    try:
        with pytest.raises(RunDirectoryError, match="in use"), run.lock():
            raise AssertionError("two trainers in one run")
        parent.kill()
        parent.wait()
        with run.lock():
            for child in children:
                os.kill(child, 0)  # they live on
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        parent.stdout.close()


TRAINER = """
import sys
from pathlib import Path
from mrlm_cli.training import checkpoint
from mrlm_cli.training.rundir import RunDirectory
run = RunDirectory.open(Path(sys.argv[1]))
with run.lock():
    checkpoint.sweep(run.checkpoints)
    found = checkpoint.newest_whole(run.checkpoints, print)
    start = 0 if found is None else checkpoint.step_of(found)
    run.rewind(start)
    print("ready", flush=True)
    for step in range(start + 1, 61):
        run.append_metrics(step, {"reward": step / 7})
        run.write_episodes(step, [{"step": step}])
        if step % 5 == 0:
            checkpoint.write(run.checkpoints, step, lambda folder: (folder / "state.json").write_text(str(step)))
            checkpoint.prune(run.checkpoints, 2)
    print("done", flush=True)
"""


def test_killed_and_resumed_until_the_end(run: RunDirectory, tmp_path: Path) -> None:
    """A run killed ten times at random moments ends with the files of an undisturbed one, byte for byte."""
    draw = random.Random(3)
    calm = RunDirectory.create(tmp_path / "calm", recipe_yaml=RECIPE, origins={}, machine={})
    subprocess.run([sys.executable, "-c", TRAINER, str(calm.path)], check=True, stdout=subprocess.DEVNULL)
    reached = []
    for _ in range(10):
        trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(run.path)], stdout=subprocess.PIPE)
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0, 0.05))
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
        reached.append(len(run.metrics()))
    assert max(reached) > 0
    assert min(reached) < 60
    subprocess.run([sys.executable, "-c", TRAINER, str(run.path)], check=True, stdout=subprocess.DEVNULL)
    assert (run.path / "metrics.jsonl").read_bytes() == (calm.path / "metrics.jsonl").read_bytes()
    for folder in ("episodes", "checkpoints"):
        assert names(run.path / folder) == names(calm.path / folder)


def test_threads_follow_affinity_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "v2" / "a" / "b"
    group.mkdir(parents=True)
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    assert machine._cpu_quota(membership, tmp_path / "v2") is None
    (group / "cpu.max").write_text("max 100000\n")
    (tmp_path / "v2" / "a" / "cpu.max").write_text("250000 100000\n")
    assert machine._cpu_quota(membership, tmp_path / "v2") == 2.5
    old = tmp_path / "v1" / "cpu,cpuacct"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("150000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    membership.write_text("5:cpu,cpuacct:/docker/abc\n1:memory:/x\n")
    assert machine._cpu_quota(membership, tmp_path / "v1") == 1.5
    monkeypatch.setattr(machine, "_affinity", lambda: 8)
    for quota, threads in ((2.5, 2), (0.5, 1), (99.0, 8), (None, 8)):
        monkeypatch.setattr(machine, "_cpu_quota", lambda *_, quota=quota: quota)
        assert machine.default_threads() == threads


def test_the_machine_is_described() -> None:
    found = machine.describe()
    json.dumps(found, allow_nan=False)
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["versions"]["torch"]
    assert found["cpus_allowed"] == len(os.sched_getaffinity(0))
    assert found["memory_mb"] > 100
    assert found["cpu"]


def test_what_a_process_wrote_down_itself_it_does_not_keep_in_memory(run: RunDirectory) -> None:
    journal = run.journal
    journal.record_turns([{"session": "a", "turn": 1, "digest": "d", "shown": {"text": "x"}}])
    journal.record_scores([{"session": "a", "reward": "r", "digest": "d", "values": {"r": 1.0}}])
    assert journal.recall_turn("a", 1, "d") is None
    assert journal.recall_score("a", "r", "d") is None
    again = RunDirectory.open(run.path).journal
    assert again.recall_turn("a", 1, "d") == {"text": "x"}
    assert again.recall_turn("a", 1, "other") is None
    assert again.recall_score("a", "r", "d")["values"] == {"r": 1.0}
