"""Checkpoints: whole or absent after kills, flipped bits found, full disks survived, old ones pruned."""

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

from mrlm_cli.errors import CheckpointError
from mrlm_cli.training import checkpoint, durable


def fill(text: str = "weights"):
    def write(directory: Path) -> None:
        (directory / "policy").mkdir()
        (directory / "policy" / "model.safetensors").write_bytes(text.encode() * 100)
        (directory / "state.json").write_text(json.dumps({"text": text}))

    return write


def never(text: str) -> None:
    raise AssertionError(text)


def visible(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_written_whole_with_manifest_and_latest(tmp_path: Path) -> None:
    parent = tmp_path / "checkpoints"
    made = checkpoint.write(parent, 40, fill())
    assert made == parent / "step-000040"
    assert os.readlink(parent / "latest") == "step-000040"
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["step"] == 40
    assert manifest["files"]["policy/model.safetensors"]["bytes"] == 700
    assert sorted(manifest["files"]) == ["policy/model.safetensors", "state.json"]
    checkpoint.verify(made)
    assert checkpoint.newest_whole(parent, never) == made
    assert visible(parent) == ["latest", "step-000040"]
    assert checkpoint.step_of(made) == 40


def test_whoever_may_look_into_a_folder_may_read_its_files(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        (directory / "policy").mkdir(mode=0o750)
        (directory / "own").mkdir(mode=0o700)
        for file in (directory / "policy" / "weights", directory / "own" / "weights"):
            file.touch(mode=0o600)

    made = checkpoint.write(tmp_path / "checkpoints", 1, fill)
    modes = [(made / place / "weights").stat().st_mode & 0o777 for place in ("policy", "own")]
    assert modes == [0o640, 0o600]


def test_everything_is_on_the_disk_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of events: every file and folder of the temporary fsynced, then the manifest, then the rename."""
    events = []
    sync, rename = durable.sync, os.rename

    def noted_sync(path: Path) -> None:
        events.append(("sync", path.name))
        sync(path)

    def noted_rename(old: Path, new: Path) -> None:
        events.append(("rename", Path(new).name))
        rename(old, new)

    monkeypatch.setattr(durable, "sync", noted_sync)
    monkeypatch.setattr(os, "rename", noted_rename)
    checkpoint.write(tmp_path, 1, fill())
    cut = events.index(("rename", "step-000001"))
    before = [name for kind, name in events[:cut] if kind == "sync"]
    assert before[:2] == ["model.safetensors", "policy"] or before[:3] == ["model.safetensors", "policy", "state.json"]
    assert "state.json" in before
    assert before[-1].startswith(".tmp-step-000001")  # the folder again, with the manifest's name in it
    assert events[cut + 1] == ("sync", tmp_path.name)


@pytest.mark.parametrize("file", ["policy/model.safetensors", "state.json"])
def test_a_flipped_bit_is_found_and_the_older_one_is_used(tmp_path: Path, file: str) -> None:
    old = checkpoint.write(tmp_path, 10, fill())
    new = checkpoint.write(tmp_path, 20, fill())
    data = bytearray((new / file).read_bytes())
    data[3] ^= 1
    (new / file).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{file} is broken.*sha256"):
        checkpoint.verify(new)
    warnings: list[str] = []
    assert checkpoint.newest_whole(tmp_path, warnings.append) == old
    assert len(warnings) == 1
    assert "step-000020" in warnings[0]
    assert file in warnings[0]


def test_other_damage_is_named(tmp_path: Path) -> None:
    made = checkpoint.write(tmp_path, 10, fill())
    (made / "state.json").write_text("")
    with pytest.raises(CheckpointError, match=r"state\.json is broken: 0 bytes instead of"):
        checkpoint.verify(made)
    (made / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read: No such file"):
        checkpoint.verify(made)
    for text, said in [("{", "not JSON"), ('{"version": 7}', "version 1"), ('{"version": 1, "files": [1]}', "sha256")]:
        (made / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=said):
            checkpoint.verify(made)
    (made / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        checkpoint.verify(made)
    assert checkpoint.newest_whole(tmp_path, lambda text: None) is None
    assert checkpoint.newest_whole(tmp_path / "absent", never) is None
    with pytest.raises(CheckpointError, match="not of the form"):
        checkpoint.step_of(tmp_path / "my-model")


def test_the_same_step_again_never_leaves_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every single rename of a replacement there is a whole checkpoint of the step, and the last is the new."""
    checkpoint.write(tmp_path, 40, fill("first"))
    seen = []
    rename = os.rename

    def watched(old: Path, new: Path) -> None:
        rename(old, new)
        found = checkpoint.newest_whole(tmp_path, never)
        assert found is not None
        assert checkpoint.step_of(found) == 40
        seen.append(json.loads((found / "state.json").read_text())["text"])

    monkeypatch.setattr(os, "rename", watched)
    checkpoint.write(tmp_path, 40, fill("second"))
    assert seen == ["first", "second", "second"]
    assert visible(tmp_path) == ["latest", "step-000040"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_replacement_cut_short_is_completed_by_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    checkpoint.write(tmp_path, 40, fill("first"))
    left = renames
    rename = os.rename

    class Killed(BaseException):
        pass

    def killed(old: Path, new: Path) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(Killed):
            checkpoint.write(tmp_path, 40, fill("second"))
    checkpoint.sweep(tmp_path)
    assert visible(tmp_path) == ["latest", "step-000040"]
    kept = json.loads((tmp_path / "step-000040" / "state.json").read_text())["text"]
    assert kept == {1: "first", 2: "second"}[renames]
    checkpoint.verify(tmp_path / "step-000040")


@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "fill"])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    old = checkpoint.write(tmp_path, 10, fill())

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if call != "fill":
            patch.setattr(os, call, full)
        with pytest.raises(CheckpointError, match=r"step 20 could not be written .*No space left.*intact"):
            checkpoint.write(tmp_path, 20, full if call == "fill" else fill())
    assert visible(tmp_path) == ["latest", "step-000010"]
    assert os.readlink(tmp_path / "latest") == "step-000010"
    assert checkpoint.newest_whole(tmp_path, never) == old


def test_what_fill_raises_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    def fails(directory: Path) -> None:
        (directory / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path, 1, fails)
    assert visible(tmp_path) == []


def test_prune_keeps_the_newest_the_best_and_what_was_not_reached(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        checkpoint.write(tmp_path, step, fill())
    checkpoint.mark_best(tmp_path, 20)
    checkpoint.prune(tmp_path, 2)
    assert visible(tmp_path) == ["best", "latest", "step-000020", "step-000040", "step-000050"]
    checkpoint.mark_best(tmp_path, 50)
    checkpoint.prune(tmp_path, 1)
    assert visible(tmp_path) == ["best", "latest", "step-000050"]
    (tmp_path / "step-000050" / "state.json").write_text("broken")
    for step in (41, 42):
        checkpoint.write(tmp_path, step, fill())  # resumed from before 50, whose checkpoint turned out broken
    checkpoint.prune(tmp_path, 2)
    assert visible(tmp_path) == ["best", "latest", "step-000041", "step-000042", "step-000050"]
    with pytest.raises(CheckpointError, match="step-000040 does not exist"):
        checkpoint.mark_best(tmp_path, 40)


WRITER = """
import sys
from pathlib import Path
from mrlm_cli.training import checkpoint
parent = Path(sys.argv[1])
checkpoint.sweep(parent)
def fill(directory):
    (directory / "policy").mkdir()
    for index in range(4):
        (directory / "policy" / f"{index}.bin").write_bytes(bytes([step % 256]) * 50_000)
print("ready", flush=True)
while True:
    for step in range(1, 6):
        checkpoint.write(parent, step, fill)
        checkpoint.mark_best(parent, step)
        checkpoint.prune(parent, 2)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Twelve SIGKILLs: never a broken visible checkpoint, once there was one there always is one."""
    draw = random.Random(7)
    temporaries = 0
    for _ in range(12):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0.03, 0.2))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        temporaries += len(list(tmp_path.glob(".tmp-*")))
        found = checkpoint.newest_whole(tmp_path, never)
        if any(tmp_path.glob("step-*")):
            assert found is not None
    assert checkpoint.newest_whole(tmp_path, never) is not None
    assert temporaries > 0  # else no kill met a writer at work and the test says nothing
    checkpoint.sweep(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))
