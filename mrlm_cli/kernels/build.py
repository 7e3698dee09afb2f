"""Compiles the kernels in C for this very processor, once: the result is kept in the user's cache directory."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_HERE = Path(__file__).parent / "c"
# No flag changes what NaN and infinities do, nor the processor's rounding of other code in the process.
_FLAGS = ("-std=c11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fPIC")
_SECONDS = 120


class CannotBuild(Exception):
    """There is no compiler, or it refused; the message says which."""


def built() -> Path:
    """The shared library for these sources, this compiler and this processor, compiled if it is not there yet.

    Raises CannotBuild.
    """
    program = compiler()
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
            if (folder / name).is_file():
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
    """The C compiler that would be used. Raises CannotBuild if there is none."""
    wanted = os.environ.get("CC")
    for name in (wanted,) if wanted else ("cc", "gcc", "clang"):
        found = shutil.which(name.split()[0])
        if found is not None:
            return found
    raise CannotBuild(f"CC is {wanted}, which is not there" if wanted else "there is no C compiler (cc, gcc or clang)")


def _compile(program: str, sources: list[Path], library: Path) -> None:
    """Each source by a process of its own, then together. Raises CannotBuild with the compiler's first complaint."""
    objects = [library.with_name(f"{path.stem}.o") for path in sources]
    steps = [
        [[program, *_FLAGS, "-c", str(path), "-o", str(made)] for path, made in zip(sources, objects, strict=True)],
        [[program, "-shared", *map(str, objects), "-o", str(library), "-lm"]],
    ]
    for commands in steps:
        running = [
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for command in commands
        ]
        try:
            complaints = [(process.communicate(timeout=_SECONDS)[1], process.returncode) for process in running]
        except subprocess.TimeoutExpired:
            raise CannotBuild(f"{program} took longer than {_SECONDS} seconds") from None
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
        for text, code in complaints:
            if code != 0:
                lines = text.decode(errors="replace").splitlines()
                first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
                raise CannotBuild(f"{program} ended with code {code}: {first}")


def _caches() -> list[Path]:
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    number = os.getuid() if hasattr(os, "getuid") else "user"
    homes = [] if user.startswith("~") else [Path(user) / "mrlm"]  # left as it is where there is no home
    return [*homes, Path(tempfile.gettempdir()) / f"mrlm-{number}"]


def _ours(folder: Path) -> bool:
    """Whether nobody else can write to a folder."""
    found = folder.stat()
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)


def _version(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBuild(f"{program} --version: {error}") from error
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
