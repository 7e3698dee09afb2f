"""The sandbox of an ordinary user: the same attacks, cheats and honest programs, without any right of root's.

Everything that needs root skips itself elsewhere, so an ordinary user repeats this by
`pytest -n 0 -m "slow or not slow" tests/test_sandbox.py`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mrlm_cli.envs.sandbox.mechanisms import STRONGEST_FIRST
from tests.hostile import CHEATS, HOSTILE, SLOW

pytestmark = [
    pytest.mark.xdist_group("sandbox"),
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can become another user"),
]
ROOT = Path(__file__).parents[1]
USER = 2_000_000_000 + os.getpid()  # nobody else has this number
DISTRIBUTIONS = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")  # all that the tests import


@pytest.fixture
def theirs() -> Iterator[Path]:
    """A copy of the sandbox, of its tests and of pytest that every user can read, in a folder of the user's own."""
    with tempfile.TemporaryDirectory(prefix="mrlm-user-", dir="/tmp") as made:
        folder, ignore = Path(made), shutil.ignore_patterns("__pycache__", "benchmarks")
        for part in ("mrlm_cli", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=ignore)
        for name in DISTRIBUTIONS:
            for file in metadata.files(name) or ():
                if not {"..", "__pycache__"} & set(file.parts):
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file.locate(), folder / file)
        for each in (folder, *folder.rglob("*")):
            each.chmod(0o755 if each.is_dir() else 0o644)
        os.chown(folder, USER, USER)
        yield folder


def python(folder: Path) -> str:
    """An interpreter that the user can start."""
    for path in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            asked = as_user([path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], folder)
        except OSError:
            continue
        if asked.returncode == 0:
            return path
    pytest.skip("another user finds no Python from 3.11 on that it can start")


def as_user(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    given = {"PATH": "/usr/bin", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=folder, user=USER, group=USER, extra_groups=[], env=given,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def outcomes(folder: Path, *options: str) -> dict[str, str]:
    """test -> "passed" or why it was skipped; whatever else came of one fails here."""
    report = folder / "report.xml"
    # Not in pytest's usual place, which a user of another number, of an earlier run, may own.
    own = [f"--junitxml={report}", f"--basetemp={folder / 'made'}"]
    command = [python(folder), "-s", "-m", "pytest", "-p", "no:cacheprovider", *own, *options]
    done = as_user([*command, "tests/test_sandbox.py"], folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        found[case.attrib["name"]] = "passed" if skipped is None else skipped.attrib["message"]
    return found


def test_quick_attacks_and_cheats(theirs: Path) -> None:
    wanted = {f"test_attack[{name}]" for name in set(HOSTILE) - SLOW}
    wanted |= {f"test_cheats_earn_nothing[{name}]" for name in CHEATS}
    found = outcomes(theirs, "-m", "not slow", "-k", "test_attack or test_cheats")
    assert found == dict.fromkeys(wanted, "passed")


@pytest.mark.slow
def test_everything(theirs: Path) -> None:
    """On every mechanism that an ordinary user has here: each attack, each cheat, and eight beside eight."""
    found = outcomes(theirs, "-m", "slow or not slow")
    held = []
    for kind in STRONGEST_FIRST:
        wanted = [f"test_attack_on_every_mechanism[{kind.__name__}-{name}]" for name in HOSTILE]
        wanted += [f"test_cheats_earn_nothing_on_any_mechanism[{kind.__name__}-{name}]" for name in CHEATS]
        wanted.append(f"test_eight_hostile_beside_eight_honest[{kind.__name__}]")
        came = {found[name] for name in wanted}
        assert len(came) == 1, came
        if came == {"passed"}:
            held.append(kind.name)
        else:
            assert came.pop().startswith(f"{kind.name} is not to be had here: ")
    assert held
    assert [name for name, what in found.items() if name.startswith(("test_attack[", "test_cheats_earn_nothing["))
            and what != "passed"] == []  # fmt: skip
