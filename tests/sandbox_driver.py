"""`python -m tests.sandbox_driver`: run by test_sandbox under another user, with a bare Python."""

from __future__ import annotations

import json
import os

from mrlm_cli.envs.sandbox import probe
from mrlm_cli.envs.sandbox.mechanisms import STRONGEST_FIRST
from mrlm_cli.envs.sandbox.records import Call, Feed, Job, Limits, Result
from tests.hostile import HOSTILE, NEVER, REFUSED

TIGHT = Limits(wall_seconds=1.0, cpu_seconds=1, test_seconds=0.5, memory_mib=96, processes=8, disk_mib=4, output_kib=64)
TRIED = ("fork_bomb", "daemon", "kill_all", "write_system", "new_namespaces", "tracing", "become_root", "environment")


def main() -> None:
    os.environ["MRLM_SECRET"] = "mrlm-environment-secret"
    found: dict[str, object] = {}
    for kind in STRONGEST_FIRST:
        sandbox = probe.attempt(kind)
        if isinstance(sandbox, str):
            found[kind.__name__] = sandbox
            continue
        leaked = []
        for name in TRIED:
            (result,) = sandbox.run(Job(HOSTILE[name].replace("@PID@", str(os.getpid())), "stdin", (Feed(""),)), TIGHT)
            words = result.text.split()
            if any(word in result.text for word in NEVER) or (
                words and words[0] in REFUSED and set(words[1:]) != {"-1"}
            ):
                leaked.append(f"{name}: {result}")
        honest = sandbox.run(Job("def f(x): return x + 1", "calls", (Call((1,)),), "f"), TIGHT)
        found[kind.__name__] = {"leaked": leaked, "honest": honest == [Result("value", value=2)]}
    print(json.dumps({"user": os.geteuid(), "mechanisms": found}))


if __name__ == "__main__":
    main()
