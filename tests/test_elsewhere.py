"""Everything that runs on a GPU runs on a device that is not the host's: in a process of its own, see `elsewhere`."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_the_cases():
    """torch learns of a device before its first backward pass or never, and never forgets it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(HERE / "elsewhere_cases.py")],
        cwd=HERE.parent,
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
