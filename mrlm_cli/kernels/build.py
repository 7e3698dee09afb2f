"""Compiles the kernels in C for this very processor, once: the result is kept in the user's cache directory."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

_HERE = Path(__file__).parent / "c"
# No flag changes what NaN and infinities do, nor the processor's rounding of other code in the process.
_FLAGS = (
    "-std=c11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-fopenmp-simd", "-fPIC",
)  # fmt: skip
_SECONDS = 120


class CannotBuild(Exception):
    """The compiler refused, or what it made cannot be used; the message says why."""


class NoCompiler(CannotBuild):
    """There is none."""


def built(*, again: bool = False) -> Path:
    """The shared library for these sources, this compiler and this processor, compiled if it is not there yet.

    With `again` what is there is not taken: it is damaged. Raises CannotBuild.
    """
    program = shlex.split(compiler())
    sources = sorted(_HERE.glob("*.c"))
    contents = hashlib.sha256()
    for part in (*(path.read_bytes() for path in sorted(_HERE.glob("*.[ch]"))), " ".join(_FLAGS).encode()):
        contents.update(hashlib.sha256(part).digest())
    contents.update(f"{_version(program)} {_processor()}".encode())
    name = f"kernels-{contents.hexdigest()[:24]}.so"
    for folder in _caches():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not _ours(folder):
                continue  # another user could have put anything there
            if (folder / name).is_file() and not again:
                return folder / name
            with tempfile.TemporaryDirectory(dir=folder) as inside:
                made = Path(inside) / name
                _compile(program, sources, made)
                made.replace(folder / name)  # at once, so that no other process ever sees half of it
            return folder / name
        except OSError:
            continue  # a home that cannot be written to: the next folder
    raise CannotBuild(f"no folder to keep compiled kernels in ({', '.join(map(str, _caches()))})")


def compiler() -> str:
    """The command of the C compiler that would be used. Raises NoCompiler."""
    wanted = os.environ.get("CC", "").strip()
    for name in (wanted,) if wanted else ("cc", "gcc", "clang"):
        if shutil.which(shlex.split(name)[0]) is not None:
            return name
    raise NoCompiler(f"CC is {wanted}, which is not there" if wanted else "there is no C compiler (cc, gcc or clang)")


def _compile(program: list[str], sources: list[Path], library: Path) -> None:
    """Each source by a process of its own, then together. Raises CannotBuild with the compiler's first complaint."""
    objects = [library.with_name(f"{path.stem}.o") for path in sources]
    steps = [
        [[*program, *_FLAGS, "-c", str(path), "-o", str(made)] for path, made in zip(sources, objects, strict=True)],
        [[*program, "-shared", *map(str, objects), "-o", str(library), "-lm"]],
    ]
    for commands in steps:
        running: list[subprocess.Popen[bytes]] = []
        try:
            for command in commands:
                running.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                    )
                )
            complaints = [(process.communicate(timeout=_SECONDS)[1], process.returncode) for process in running]
        except subprocess.TimeoutExpired:
            raise CannotBuild(f"{program[0]} took longer than {_SECONDS} seconds") from None
        except OSError as error:
            raise CannotBuild(f"{program[0]} cannot be started: {error}") from error
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
        for text, code in complaints:
            if code != 0:
                lines = text.decode(errors="replace").splitlines()
                first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
                raise CannotBuild(f"{program[0]} ended with code {code}: {first}")


def _caches() -> list[Path]:
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    number = os.getuid() if hasattr(os, "getuid") else "user"
    homes = [] if user.startswith("~") else [Path(user) / "mrlm"]  # left as it is where there is no home
    return [*homes, Path(tempfile.gettempdir()) / f"mrlm-{number}"]


def _ours(folder: Path) -> bool:
    """Whether nobody else can write to a folder."""
    found = folder.lstat()  # not what a link leads to, which may change
    return stat.S_ISDIR(found.st_mode) and (
        not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
    )


def _version(program: list[str]) -> str:
    try:
        done = subprocess.run([*program, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBuild(f"{program[0]} --version: {error}") from error
    return done.stdout


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part", "CPU implementer")
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in wanted:
            found.setdefault(name.strip(), value.strip())
    return repr(sorted(found.items()))
