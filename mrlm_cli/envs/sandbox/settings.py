"""The sandbox's section in the settings of an environment."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mrlm_cli.envs.sandbox.records import Limits
from mrlm_cli.strict import Strict


class SandboxSettings(Strict):
    """Bounds of one program, all of its tests together. The mechanism is the strongest that works on the machine."""

    wall_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Wall time; a program that sleeps or waits is ended by it. It must be below hardware.deadline."""
    cpu_seconds: Annotated[int, Field(ge=1, le=3600)] = 5
    """CPU time of each process."""
    test_seconds: Annotated[float, Field(gt=0, le=3600)] = 2.0
    """CPU time of one test; the tests after it still run."""
    memory_mib: Annotated[int, Field(ge=32, le=1_000_000)] = 256
    """Memory: of all processes together where there are control groups, else of each."""
    processes: Annotated[int, Field(ge=1, le=10_000)] = 16
    """Processes and threads at one time."""
    disk_mib: Annotated[int, Field(ge=1, le=100_000)] = 16
    """Size of the private /tmp."""
    output_kib: Annotated[int, Field(ge=1, le=100_000)] = 256
    """Output of one test, and of all results together."""
    allow_unsafe: bool = False
    """Run programs without any sandbox where none works: they can then do whatever you can do."""

    def limits(self) -> Limits:
        """The bounds without pydantic."""
        return Limits(
            wall_seconds=self.wall_seconds,
            cpu_seconds=self.cpu_seconds,
            test_seconds=self.test_seconds,
            memory_mib=self.memory_mib,
            processes=self.processes,
            disk_mib=self.disk_mib,
            output_kib=self.output_kib,
        )
