"""The program's side: runs inside the sandbox, as `python -s -S -B -c THIS request results stdin stdout`.

The four numbers are file descriptors: a request to read (marshal; written by the trusted side), a pipe for results, and
two memory files that stand for the program's standard input and output. Nothing is imported that start-up does not hold
already, because every module costs a millisecond of every run. After the line `["ready"]` nothing here is trusted: the
program shares this interpreter, can rewrite all of it, and gains nothing, since what is sent are values alone.
"""

import _signal  # type: ignore[import-not-found]  # signal itself imports enum
import marshal
import posix
import sys
from _json import encode_basestring_ascii as quoted

MOST_MESSAGE = 500  # characters of an exception's text
MOST_DEPTH = 90  # of a value that is sent


class OutOfTime(BaseException):
    """One test used up its CPU time."""


def whole(descriptor, most):
    """All of a file from its start, at most `most` bytes."""
    pieces, at = [], 0
    while at < most and (piece := posix.pread(descriptor, min(most - at, 1 << 20), at)):
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)


def encoded(value, depth=0):
    """A value as JSON text that names its type. Subclasses are sent as the plain type that they extend."""
    if depth > MOST_DEPTH:
        return '["o","nested too deeply"]'
    if value is None:
        return '["n"]'
    if value is True or value is False:
        return '["b",true]' if value else '["b",false]'
    if isinstance(value, int):
        return f'["i","{int.__format__(value, "x")}"]'
    if isinstance(value, float):
        return f'["f","{float.hex(value)}"]'
    if isinstance(value, complex):
        return f'["c","{float.hex(value.real)}","{float.hex(value.imag)}"]'
    if isinstance(value, str):
        return f'["s",{quoted(str.__str__(value))}]'
    if isinstance(value, bytes):
        return f'["y","{bytes.hex(value)}"]'
    for tag, kind in (("l", list), ("t", tuple), ("e", set), ("e", frozenset)):
        if isinstance(value, kind):
            items = ",".join([encoded(item, depth + 1) for item in kind.__iter__(value)])
            return f'["{tag}",[{items}]]'
    if isinstance(value, dict):
        pairs = ",".join([f"[{encoded(k, depth + 1)},{encoded(v, depth + 1)}]" for k, v in dict.items(value)])
        return f'["d",[{pairs}]]'
    return f'["o",{quoted(type(value).__name__)}]'


def described(error):
    """`"type","text",line` of an exception; the line is the program's last one in the traceback."""
    line, frame = 0, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "program.py":
            line = frame.tb_lineno
        frame = frame.tb_next
    if isinstance(error, SyntaxError) and error.filename == "program.py":
        line = error.lineno or 0
        text = error.msg or ""
    else:
        text = str(error)
    return f"{quoted(type(error).__name__)},{quoted(str(text)[:MOST_MESSAGE])},{line}"


def main(request_fd, results_fd, stdin_fd, stdout_fd):
    request = marshal.loads(whole(request_fd, 1 << 30))
    posix.close(request_fd)
    if request["lockdown"] is not None:
        exec(compile(request["lockdown"]["source"], "lockdown.py", "exec"), namespace := {"__name__": "lockdown"})
        namespace["lock"](request["lockdown"], request["rlimits"])
    else:
        import resource

        for name, value in request["rlimits"]:
            resource.setrlimit(getattr(resource, name), (value, value))
    seconds, most = request["seconds"], request["output"]
    streams = []

    def send(text):
        data = text.encode() + b"\n"
        while data:
            data = data[posix.write(results_fd, data) :]

    def late(number, frame):
        raise OutOfTime

    def standard(text):
        """Fresh standard streams, at the level of file descriptors as well."""
        for stream in streams:  # what an earlier test left in its buffers must not come out in this one
            try:  # noqa: SIM105 (importing contextlib would cost every run)
                stream.close()
            except BaseException:
                pass
        posix.ftruncate(stdin_fd, 0)
        posix.pwrite(stdin_fd, text.encode("utf-8", "replace"), 0)
        posix.ftruncate(stdout_fd, 0)
        for descriptor, number in ((stdin_fd, 0), (stdout_fd, 1)):
            posix.lseek(descriptor, 0, 0)
            posix.dup2(descriptor, number)
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115 (the program's)
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        streams[:] = [sys.stdin, sys.stdout]

    def guarded(act):
        """`act` with the CPU time of one test; its result, or the words about its failure."""
        try:
            _signal.setitimer(_signal.ITIMER_PROF, seconds)
            try:
                return act()
            finally:
                _signal.setitimer(_signal.ITIMER_PROF, 0)
        except OutOfTime:
            return '"time"'
        except MemoryError:
            return '"memory"'
        except BaseException as error:
            try:
                return '"error",' + described(error)
            except BaseException:  # an exception whose own text fails
                return '"error","Exception","",0'

    def script(code):
        try:
            exec(code, {"__name__": "__main__", "__builtins__": __builtins__})
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
        sys.stdout.flush()
        printed = whole(stdout_fd, most + 1)
        if len(printed) > most:
            return '"output"'
        return '"printed",' + quoted(printed.decode("utf-8", "replace"))

    posix.dup2(posix.open("/dev/null", posix.O_WRONLY), 2)  # until here it told the outside what went wrong
    _signal.signal(_signal.SIGPROF, late)
    send('["ready"]')
    try:
        code = compile(request["program"], "program.py", "exec", dont_inherit=True)
    except BaseException as error:  # not only SyntaxError: NUL, nesting and size have exceptions of their own
        send(f'["syntax",{described(error)}]')
        send('["end"]')
        return
    send('["compiled"]')
    module = {"__name__": "program", "__builtins__": __builtins__}
    if request["form"] == "calls":
        standard("")
        failed = guarded(lambda: exec(code, module))
        entry = module.get(request["entry"])
        if failed is None and not callable(entry):
            failed = f'"error","NameError",{quoted("there is no function " + request["entry"])},0'
    for number, test in enumerate(request["tests"]):
        if request["form"] == "stdin":
            standard(test)
            outcome = guarded(lambda: script(code))
        elif failed is not None:
            outcome = failed
        else:
            outcome = guarded(lambda test=test: '"value",' + encoded(entry(*marshal.loads(test))))
        send(f"[{number},{outcome}]")
    send('["end"]')


main(*map(int, sys.argv[1:5]))
posix._exit(0)
