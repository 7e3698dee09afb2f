"""Runs programs that nobody trusts, on Linux.

    sandbox = choose()                                        # the strongest mechanism that works here, by a real probe
    results = run(sandbox, Job(program, "calls", (Call((1, 2)),), entry="add"), Limits())

Three mechanisms, strongest first. Each is tried by running a program that attacks it, and used only if that fails:

1. bubblewrap + cgroup + seccomp: namespaces of its own for users, processes, network, mounts, System V objects and host
   name; memory and number of processes limited for all of its processes together; a list of allowed system calls.
2. bubblewrap + seccomp + rlimits: the same without control groups. Started by root it runs under a user number that
   nobody else has. Memory is limited for each process, so all together may use `memory x processes`.
3. Landlock + seccomp + rlimits, without any privilege or helper program: one process, which can start no other, signal
   none, and write to no file system at all.

Covered, by tests that look from outside: no network; the system read-only; a private /tmp of bounded size (in the third
none); wall time, CPU time, memory, processes and output bounded; no process left behind; nothing of the host's
environment, files and processes to be read; expected values never inside (results are sent out as values of plain
types, and compared outside by type and value). The slow tests run every attack and every cheat under each mechanism
that the machine has, and eight hostile programs beside eight honest ones, as root and as an ordinary user.

Not covered: bugs of the kernel and of the processor (there is no virtual machine); the program reads the interpreter's
installation and the system's shared libraries, and learns processor, kernel version and clocks; CPU time is limited for
each process, and for all of them by wall time times processors. In the third mechanism names, sizes and times of host
files can be asked for (`stat`), though their content cannot, and the program sees its own user number; started by an
ordinary user, whose processes all count against the limit, it may get no thread at all. A program can always make
itself fail: a kill that it brings about is its own failure, not the sandbox's.

A failure of the sandbox itself, up to the moment when the program starts, is tried again, counted in
`Sandbox.failures`, and then raised as SandboxFailure: it is never a verdict about a program.
"""
