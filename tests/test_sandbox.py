"""The sandbox, judged from outside: what attacks leave behind, what graders' cheats earn, what honest programs get."""

import os
import platform
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mrlm_cli.envs.sandbox import box, cgroups, mechanisms, probe, seccomp, syscalls
from mrlm_cli.envs.sandbox.box import Sandbox
from mrlm_cli.envs.sandbox.mechanisms import STRONGEST_FIRST, Landlocked, Mechanism, Unsafe
from mrlm_cli.envs.sandbox.records import Call, Feed, Job, Limits, Opaque, Result
from mrlm_cli.envs.sandbox.values import decode, same
from mrlm_cli.errors import SandboxFailure, UserError
from tests.hostile import CHEATS, HOSTILE, NEVER, REFUSED, SLOW

pytestmark = [
    pytest.mark.xdist_group("sandbox"),  # survivors are looked for over the whole machine
    pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are for Linux"),
]
TIGHT = Limits(wall_seconds=1.5, cpu_seconds=1, test_seconds=1.0, memory_mib=96, processes=8, disk_mib=4, output_kib=64)
SECRET = "canary-secret-4711"
RUNNER = b"The program's side: runs inside the sandbox"


def sandbox(kind: type[Mechanism]) -> Sandbox:
    found = probe.attempt(kind)
    if isinstance(found, str):
        pytest.skip(f"{kind.name} is not to be had here: {found}")
    return found


@pytest.fixture(params=STRONGEST_FIRST, ids=lambda kind: kind.__name__)
def each(request: pytest.FixtureRequest) -> Sandbox:
    return sandbox(request.param)


@pytest.fixture(scope="module")
def best() -> Sandbox:
    return probe.choose()


def survivors(since: float) -> list[str]:
    """Host processes, started after `since` (seconds since boot), that run a sandbox's interpreter or bubblewrap.

    Those that descend from another worker of the test run are that worker's own. An ordinary user's sandboxes all keep
    its number.
    """
    found, parents = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                user = re.search(r"^Uid:\t(\d+)", (folder / "status").read_text(), re.MULTILINE)
            except OSError:
                continue  # it ended while we looked
            if os.geteuid() != 0 and user is not None and int(user[1]) != os.geteuid():
                continue
            process = int(folder.name)
            parents[process] = int(fields[1])
            started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
            if started >= since - 0.02 and (RUNNER in command or command.startswith(b"/usr/bin/bwrap")):
                found[process] = f"{process} {fields[0]} {command[:60]!r}"
    others = set()
    if "PYTEST_XDIST_WORKER" in os.environ:
        others = {process for process, parent in parents.items() if parent == os.getppid()} - {os.getpid()}

    def lineage(process: int) -> Iterator[int]:
        while process in parents:
            yield process
            process = parents[process]

    return [text for process, text in found.items() if others.isdisjoint(lineage(process))]


def nothing_survives(since: float) -> bool:
    """Whether all are gone after at most 3 seconds: another worker's, orphaned as they are killed, need a moment."""
    until = time.monotonic() + 3
    while survivors(since):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@dataclass
class Outside:
    """The world that a program must not touch."""

    canary: Path
    port: int
    heard: list[str]

    def fill(self, program: str) -> str:
        for mark, value in (("@CANARY@", self.canary), ("@PORT@", self.port), ("@PID@", os.getpid())):
            program = program.replace(mark, str(value))
        return program


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    monkeypatch.setenv("MRLM_SECRET", "mrlm-environment-secret")
    descriptor, name = tempfile.mkstemp(prefix="canary-", dir="/tmp")
    os.write(descriptor, SECRET.encode())
    os.fchmod(descriptor, 0o666)
    os.close(descriptor)
    os.utime(name, (1e9, 1e9))
    with socket.socket() as stream, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        stream.bind(("127.0.0.1", 0))
        stream.listen()
        port = stream.getsockname()[1]
        datagrams.bind(("127.0.0.1", port))
        with (
            socket.socket(socket.AF_UNIX) as abstract,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as letters,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as box,
        ):
            abstract.bind(f"\0mrlm-canary-{port}")
            abstract.listen()
            letters.bind(f"\0mrlm-letters-{port}")
            box.bind(f"{name}.socket")
            os.chmod(f"{name}.socket", 0o777)
            heard: list[str] = []
            yield Outside(Path(name), port, heard)
            for listener in (stream, abstract, datagrams, letters, box):
                listener.setblocking(False)
                try:
                    listener.recv(1) if listener.type == socket.SOCK_DGRAM else listener.accept()[0].close()
                    heard.append(str(listener))
                except BlockingIOError:
                    pass
            os.unlink(f"{name}.socket")
            assert heard == []
    assert Path(name).read_text() == SECRET
    found = os.stat(name)
    assert (found.st_mtime, found.st_mode & 0o777, found.st_nlink) == (1e9, 0o666, 1)
    os.unlink(name)


def told(results: list[Result]) -> str:
    return "\n".join(f"{result.value} {result.text}" for result in results)


def attack(where: Sandbox, name: str, outside: Outside) -> None:
    """Run a hostile program, and look around."""
    host, priority = socket.gethostname(), os.getpriority(os.PRIO_PROCESS, 0)
    before = set(os.listdir("/tmp"))
    since = time.clock_gettime(time.CLOCK_BOOTTIME)
    start = time.monotonic()
    results = where.run(Job(outside.fill(HOSTILE[name]), "stdin", (Feed(""),)), TIGHT)
    assert time.monotonic() - start < TIGHT.wall_seconds + 4.0
    assert nothing_survives(since), survivors(since)
    said = told(results)
    assert not [word for word in NEVER if word in said], said
    for line in said.splitlines():
        first, *numbers = line.split()
        if first in REFUSED:
            assert set(numbers) == {"-1"}, line
    assert (socket.gethostname(), os.getpriority(os.PRIO_PROCESS, 0)) == (host, priority)
    new = {each for each in set(os.listdir("/tmp")) - before if each.isdigit() or "link" in each or "owned" in each}
    assert not new
    assert not [
        place for place in ("/", "/usr/lib", "/lib", "/etc", "/dev", "/var") if Path(place, "mrlm-owned").exists()
    ]
    honest = Job("def add(a, b): return a + b", "calls", (Call((2, 3)),), entry="add")
    assert where.run(honest, TIGHT) == [Result("value", value=5)]


def test_enough_attacks_and_cheats() -> None:
    assert len(HOSTILE) >= 30
    assert len(CHEATS) >= 15
    assert set(HOSTILE) >= SLOW


def test_a_mechanism_is_there() -> None:
    """All tests below skip mechanisms that are absent; were all of them, this one would say so."""
    if not seccomp.supported():
        pytest.skip("no sandbox is written for this machine's architecture")
    assert probe.choose().name.startswith(tuple(kind.name for kind in STRONGEST_FIRST))


@pytest.mark.parametrize("name", sorted(set(HOSTILE) - SLOW))
def test_attack(best: Sandbox, name: str, outside: Outside) -> None:
    attack(best, name, outside)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_attack_on_every_mechanism(each: Sandbox, name: str, outside: Outside) -> None:
    attack(each, name, outside)


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_earn_nothing(best: Sandbox, name: str) -> None:
    cheat(best, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS)
def test_cheats_earn_nothing_on_any_mechanism(each: Sandbox, name: str) -> None:
    cheat(each, name)


def cheat(where: Sandbox, name: str) -> None:
    """Run a program that tries to be called right without knowing the answers."""
    expected = [int.from_bytes(os.urandom(6), "little") + 2 for _ in range(3)]
    job = Job(CHEATS[name], "calls", tuple(Call((x,)) for x in range(3)), entry="answer")
    results = where.run(job, TIGHT)
    assert len(results) == 3
    right = [
        result.kind == "value" and same(value, result.value) for value, result in zip(expected, results, strict=True)
    ]
    assert right == [False] * 3


@pytest.mark.slow
def test_eight_hostile_beside_eight_honest(each: Sandbox, outside: Outside) -> None:
    honest = [
        Job(f"def f(x): return [x * {n}, str(x), {{x: sum(range(20000))}}]", "calls", (Call((n,)), Call((n + 1,))), "f")
        for n in range(8)
    ]
    names = ["fork_bomb", "memory_in_children", "deaf", "fill_disk", "pipe_flood", "daemon", "threads", "kill_all"]
    hostile = [Job(outside.fill(HOSTILE[name]), "stdin", (Feed(""),)) for name in names]
    since = time.clock_gettime(time.CLOCK_BOOTTIME)
    failures = each.failures
    with ThreadPoolExecutor(16) as pool:
        running = [
            pool.submit(each.run, job, replace(TIGHT, wall_seconds=20.0) if job in honest else TIGHT)
            for pair in zip(hostile, honest, strict=True)
            for job in pair
        ]
        results = [one.result() for one in running]
    for n, found in enumerate(results[1::2]):
        total = sum(range(20000))
        assert found == [Result("value", value=[x * n, str(x), {x: total}]) for x in (n, n + 1)]
    assert nothing_survives(since), survivors(since)
    assert each.failures == failures


# honest programs


def test_values_come_back_as_they_are(each: Sandbox) -> None:
    given = (None, True, -3, 2**80, 1.5, float("inf"), 2j, "ä\0\ud800"[:2], b"\xff", [1, (2,)], {"a": {1, 2}, 3: None})
    program = "def f(x):\n    print('ignored')\n    return x"
    results = each.run(Job(program, "calls", tuple(Call((value,)) for value in given), "f"), Limits())
    assert [result.kind for result in results] == ["value"] * len(given)
    assert all(same(value, result.value) for value, result in zip(given, results, strict=True))


def test_scripts_read_and_print(each: Sandbox) -> None:
    program = "import sys\nn = int(input())\nprint(n * 2)\nprint(sys.stdin.read().upper(), end='')"
    results = each.run(Job(program, "stdin", (Feed("4\nab\nc"), Feed("5\n"), Feed("x"))), Limits())
    assert [result.text for result in results[:2]] == ["8\nAB\nC", "10\n"]
    assert (results[2].kind, results[2].line) == ("error", 2)
    assert results[2].text.startswith("ValueError: invalid literal")
    whole = "print(sum(map(int, open(0).read().split())))"
    results = each.run(Job(whole, "stdin", (Feed("1 2\n3"), Feed("4 5"))), Limits())
    assert [result.text for result in results] == ["6\n", "9\n"]


def test_common_modules_work(each: Sandbox) -> None:
    names = "math re json random itertools collections functools heapq bisect string datetime decimal fractions typing"
    names += " dataclasses copy statistics operator threading asyncio hashlib"
    program = f"import {', '.join(names.split())}\ndef f(): return math.comb(5, 2), re.findall('b', 'abb')"
    assert each.run(Job(program, "calls", (Call(()),), "f"), Limits()) == [Result("value", value=(10, ["b", "b"]))]


def test_one_test_does_not_spoil_the_others(each: Sandbox) -> None:
    program = (
        "def f(x):\n    if x == 1:\n        while True: pass\n    if x == 2:\n        return 1 // 0\n"
        "    if x == 3:\n        return object()\n    if x == 4:\n        return bytearray(1 << 40)\n    return x"
    )
    limits = replace(Limits(), test_seconds=0.1)
    results = each.run(Job(program, "calls", tuple(Call((x,)) for x in range(6)), "f"), limits)
    assert [result.kind for result in results] == ["value", "time", "error", "value", "memory", "value"]
    assert (results[2].text, results[2].line) == ("ZeroDivisionError: integer division or modulo by zero", 5)
    assert results[3].value == Opaque("object")


def test_what_is_no_program(best: Sandbox) -> None:
    for program in ("def f(:", "\0", "x = " + "(" * 500, "é = '\ud800'"[:8]):
        job = Job(program, "calls", (Call(()), Call(())), "f")
        kinds = {result.kind for result in best.run(job, Limits())}
        assert kinds <= {"syntax", "error"}, program
    (result,) = best.run(Job("x = 1\ndef f(:\n    pass", "calls", (Call(()),), "f"), Limits())
    assert (result.kind, result.line, result.text) == ("syntax", 2, "SyntaxError: invalid syntax")
    (result,) = best.run(Job("g = 1", "calls", (Call(()),), "f"), Limits())
    assert result.text == "NameError: there is no function f"


def test_private_tmp(best: Sandbox) -> None:
    if isinstance(best.mechanism, Landlocked):
        pytest.skip("this mechanism gives no writable files")
    program = "import tempfile\ndef f():\n    with tempfile.TemporaryFile('w+') as t:\n"
    program += "        t.write('a'); t.seek(0); return t.read()"
    assert best.run(Job(program, "calls", (Call(()),), "f"), Limits()) == [Result("value", value="a")]
    left = Job(
        "open('/tmp/left', 'w').close()\ndef f(): return __import__('os').listdir('/tmp')", "calls", (Call(()),), "f"
    )
    assert [best.run(left, Limits())[0].value for _ in range(2)] == [["left"]] * 2


# the sandbox's own failures


def test_a_broken_sandbox_is_never_a_verdict(best: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Sandbox(best.mechanism)
    monkeypatch.setattr(box, "_runner", lambda: "raise SystemError('no luck')")
    with pytest.raises(SandboxFailure, match="failed 3 times: SystemError: no luck"):
        broken.run(Job("", "stdin", (Feed(""),)), Limits())
    assert broken.failures == 3


def test_a_passing_failure_is_retried_and_counted(best: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = box._runner()
    tries = iter(["raise SystemError", sound])
    monkeypatch.setattr(box, "_runner", lambda: next(tries))
    mended = Sandbox(best.mechanism)
    assert mended.run(Job("print(1)", "stdin", (Feed(""),)), Limits()) == [Result("printed", text="1\n")]
    assert mended.failures == 1


def test_no_sandbox_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "attempt", lambda kind: "not today")
    choose = probe.choose.__wrapped__
    with pytest.raises(UserError, match=r"allow_unsafe.*bubblewrap \+ cgroup \+ seccomp: not today"):
        choose()
    unsafe = choose(True)
    assert isinstance(unsafe.mechanism, Unsafe)
    assert "NONE" in unsafe.name
    assert unsafe.run(Job("print(1)", "stdin", (Feed(""),)), Limits())[0].text == "1\n"


def test_the_probe_sees_what_leaks() -> None:
    leaks = probe._leaks(Sandbox(Unsafe(probe.interpreter.candidates()[0])))
    if os.geteuid() == 0:  # what it could write, it wrote
        for place in ("/mrlm-probe", "/usr/lib/mrlm-probe"):
            Path(place).unlink()
    assert {"it reads files", "it reaches the network", "it signals processes"} <= set(leaks)


# parts


def test_same_is_strict_about_types() -> None:
    assert same([1, (2.0, "a")], [1, (2.0 + 1e-12, "a")])
    assert same({1, 2}, {2, 1})
    assert same(float("nan"), float("nan"))
    for a, b in ((1, True), (2, 2.0), ([1], (1,)), ("1", 1), (None, False), ({1}, {True}), ({"a": 1}, {"a": 1.0})):
        assert not same(a, b)
        assert not same(b, a)
    assert not same(Opaque("x"), Opaque("x"))
    assert not same(1.0, 1.0 + 1e-6)


@pytest.mark.parametrize(
    "form", [[], ["x"], ["i", 5], ["i", "zz"], ["l", 5], ["d", [[["n"]]]], ["e", [["l", []]]], 5, None]
)
def test_decode_refuses(form) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        decode(form)


def test_the_filter_is_a_whole_program() -> None:
    reach = {"chmod", "fchmod", "fchmodat", "utime", "utimes", "utimensat", "truncate", "kill", "fork", "execve"}
    assert not syscalls.numbers(syscalls.ALWAYS, "x86_64").keys() & (reach | {"socketpair"})
    for alone in (False, True):
        code = seccomp.program(alone=alone)
        steps = [code[i : i + 8] for i in range(0, len(code), 8)]
        assert len(steps) < 4096
        assert steps[-1][:2] == b"\x06\x00"  # whoever comes here is refused
        for place, step in enumerate(steps):
            if step[0] in (0x15, 0x35, 0x45):
                assert place + 1 + max(step[2], step[3]) < len(steps)
    for machine in ("x86_64", "aarch64"):
        names = syscalls.numbers(syscalls.ALWAYS, machine) | syscalls.numbers(syscalls.IN_NAMESPACES, machine)
        assert {"execve", "openat", "write", "exit_group"} <= names.keys()
        assert not names.keys() & {
            "socket",
            "mount",
            "ptrace",
            "bpf",
            "io_uring_setup",
            "unshare",
            "setns",
            "memfd_create",
        }
        assert len(set(names.values())) == len(names)


def verdict(code: bytes, number: int, *arguments: int) -> int:
    """What the kernel would find in the filter for a system call."""
    machine = seccomp._ARCHITECTURES[platform.machine()]
    data = struct.pack("<iIQ6Q", number, machine, 0, *arguments, *[0] * (6 - len(arguments)))
    place = loaded = 0
    while True:
        what, yes, no, value = struct.unpack_from("<HBBI", code, 8 * place)
        place += 1
        if what == 0x06:
            return value
        if what == 0x20:
            (loaded,) = struct.unpack_from("<I", data, value)
            continue
        holds = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[what]
        place += yes if holds else no


@pytest.mark.skipif(not seccomp.supported(), reason="no table of system calls for this machine")
def test_nothing_is_cut_to_nothing_by_opening_it_to_read() -> None:
    """Landlock before its third version asks only whether a file may be read."""
    names = syscalls.numbers(syscalls.ALWAYS, platform.machine())
    alone, hidden = seccomp.program(alone=True), seccomp.program(alone=False)
    for name, before in (("open", (0,)), ("openat", (0, 0))):
        if name in names:
            for mode in range(4):
                for more in (0, os.O_CLOEXEC, os.O_CREAT):
                    assert verdict(alone, names[name], *before, mode | more) == seccomp._ALLOW
                    found = verdict(alone, names[name], *before, mode | more | os.O_TRUNC)
                    assert found == (seccomp._ALLOW if mode in (os.O_WRONLY, os.O_RDWR) else seccomp._REFUSE)
                    assert verdict(hidden, names[name], *before, mode | more | os.O_TRUNC) == seccomp._ALLOW
    assert verdict(alone, 437) == seccomp._REFUSE  # openat2
    assert verdict(hidden, 437) == seccomp._ALLOW


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    """Against a folder that looks like one; the machine at hand may have version 1."""
    own = tmp_path / "self"
    own.write_text("0::/user.slice/one.scope\n")
    root = tmp_path / "cgroup"
    (root / "user.slice/one.scope").mkdir(parents=True)
    with pytest.raises(OSError, match="hands on memory and pids"):
        cgroups.find(root, own)
    (root / "user.slice/cgroup.subtree_control").write_text("cpu memory pids")
    groups = cgroups.find(root, own)
    group = groups.take()
    assert group.memory == group.pids == root / "user.slice" / group.memory.name
    for name in ("memory.max", "memory.oom.group", "pids.max", "cgroup.procs"):
        (group.memory / name).write_text("")
    (group.memory / "memory.events").write_text("low 0\noom_kill 2\n")
    group.limit(Limits(memory_mib=64, processes=5))
    read = {name: (group.memory / name).read_text() for name in ("memory.max", "memory.oom.group", "pids.max")}
    assert read == {"memory.max": str(64 * 2**20), "memory.oom.group": "1", "pids.max": "8"}
    assert not group.out_of_memory()
    (group.memory / "memory.events").write_text("low 0\noom_kill 3\n")
    assert group.out_of_memory()
    assert group.entrances == (group.memory / "cgroup.procs",)
    groups.give(group)
    assert groups.take() is group


def test_groups_are_removed_and_swept() -> None:
    try:
        groups = cgroups.find()
    except OSError as error:
        pytest.skip(str(error))
    stale = groups._parents[0] / f"{cgroups._PREFIX}999999999-0"
    stale.mkdir()
    group = groups.take()
    assert group.memory.is_dir()
    assert cgroups.find() is not groups
    assert not stale.exists()
    groups.remove()
    assert not group.memory.exists()


def test_a_program_does_not_outlive_a_killed_parent(each: Sandbox) -> None:
    """A worker process that misses its deadline is killed before it can end its program."""
    script = f"""
from mrlm_cli.envs.sandbox import mechanisms, probe
from mrlm_cli.envs.sandbox.records import Feed, Job, Limits
sandbox = probe.attempt(mechanisms.{type(each.mechanism).__name__})
print("ready", flush=True)
undone = "try:\\n    import ctypes\\n    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\\nexcept BaseException:\\n    pass\\n"
sandbox.run(Job(undone + "import time\\ntime.sleep(1000)", "stdin", (Feed(""),)), Limits(wall_seconds=600))
"""
    since = float(Path("/proc/uptime").read_text().split()[0])
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        time.sleep(1.0)
        assert survivors(since)
        parent.kill()
    assert nothing_survives(since), survivors(since)


def test_jobs_run_side_by_side(best: Sandbox) -> None:
    """Sleeping programs take the time of one, not of all."""
    job = Job("import time\ntime.sleep(0.5)", "stdin", (Feed(""),))
    start = time.monotonic()
    threads = [threading.Thread(target=best.run, args=(job, Limits())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start < 1.5
    assert mechanisms.STRONGEST_FIRST
