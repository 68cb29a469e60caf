"""Renders a checkpoint's template in a process of its own, with limits on time and memory.

A sandboxed template can still loop for ever, and a single filter can fill the memory from inside
one C call that no Python code interrupts. So the kernel enforces the limits: a timer of CPU time
whose signal kills, a bound on the address space, no new file descriptors, no file written. The
process is started at the first render (about 0.1 s) and kept; after a kill the next render starts
another. It ends when its input ends, so it does not outlive this process.

A frame is a length (4 bytes, little-endian) and that much JSON. The first request is the template's
source; each later one is the variables of a render, answered by its text or by a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any, BinaryIO

from lfm2_gpu.chat.jinja import LocalRenderer, TemplateFailure

__all__ = ["BoxedRenderer", "serve"]

CPU_SECONDS = 2.0
# a busy machine may not give CPU_SECONDS in time, so this only ends what makes no progress
_WALL_SECONDS = 30.0
_MEMORY_BYTES = 2**30
_MAX_FRAME_BYTES = 2**30
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lfm2_gpu.chat.box import serve; serve()"
)


class BoxedRenderer:
    """Compiles and renders in the box; one render at a time, from any thread."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._variables: frozenset[str] = frozenset()

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not set; `TemplateFailure` if it is none."""
        with self._lock:
            self._ready()
            return self._variables

    def render(self, variables: Mapping[str, Any], max_chars: int) -> str:
        """The text; `TemplateFailure` if there is none or it broke a limit."""
        with self._lock:
            process = self._ready()
            answer = self._exchange(process, {"variables": variables, "max_chars": max_chars})
            return str(answer["text"])

    def close(self) -> None:
        """End the process; a later render starts another."""
        with self._lock:
            self._drop()

    def _ready(self) -> subprocess.Popen[bytes]:
        # after a fork the pipes are the parent's, and so are the answers in them
        if self._process is None or self._owner != os.getpid():
            process = _start()
            self._process, self._owner = process, os.getpid()
            weakref.finalize(self, _end, process)
            try:
                answer = self._exchange(process, {"source": self._source})
            except TemplateFailure:
                self._drop()
                raise
            self._variables = frozenset(answer["variables"])
        return self._process

    def _exchange(
        self, process: subprocess.Popen[bytes], request: dict[str, Any]
    ) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin.fileno(), {**request, "cpu_seconds": CPU_SECONDS})
            answer = _receive(process.stdout.fileno(), time.monotonic() + _WALL_SECONDS)
        except TimeoutError:
            self._drop()
            raise TemplateFailure(f"no answer within {_WALL_SECONDS:g} s") from None
        except (OSError, EOFError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            self._drop()
            raise TemplateFailure(_cause_of_death(process.returncode)) from None
        except BaseException:
            # an answer left in the pipe would be taken for the next request's
            self._drop()
            raise
        if "failure" in answer:
            raise TemplateFailure(answer["failure"], by_request=answer["by_request"])
        return answer

    def _drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _end(process)


def _start() -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            # an interrupt from the terminal is this process's to handle
            start_new_session=True,
        )
    except OSError as error:
        raise TemplateFailure(f"no process can be started to render it: {error}") from error


def _end(process: subprocess.Popen[bytes]) -> None:
    # in a fork this only closes the copies of the pipes: kill() signals its own children alone
    process.kill()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
    process.wait()


def _cause_of_death(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"it ran for more than {CPU_SECONDS:g} s"
    return f"it ended its process with code {code}"


def _send(fd: int, message: object) -> None:
    payload = json.dumps(message).encode()
    frame = memoryview(struct.pack("<I", len(payload)) + payload)
    while frame:
        frame = frame[os.write(fd, frame) :]


def _receive(fd: int, deadline: float) -> dict[str, Any]:
    (length,) = struct.unpack("<I", _read(fd, 4, deadline))
    if length > _MAX_FRAME_BYTES:
        raise EOFError
    message = json.loads(_read(fd, length, deadline))
    assert isinstance(message, dict)
    return message


def _read(fd: int, length: int, deadline: float) -> bytes:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    parts = []
    while length:
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(fd, min(length, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def serve() -> None:
    """The process in the box: answers requests on standard input until it ends."""
    _load_everything()
    _limit_this_process()
    renderer: LocalRenderer | None = None
    while (request := _next_request(sys.stdin.buffer)) is not None:
        # the default action of its signal ends the process, even inside a C call
        signal.setitimer(signal.ITIMER_PROF, request["cpu_seconds"])
        answer: dict[str, Any]
        try:
            if renderer is None:
                renderer = LocalRenderer(request["source"])
                answer = {"variables": sorted(renderer.variables)}
            else:
                answer = {"text": renderer.render(request["variables"], request["max_chars"])}
        except TemplateFailure as failure:
            answer = {"failure": str(failure), "by_request": failure.by_request}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(sys.stdout.fileno(), answer)


def _load_everything() -> None:
    """Make jinja import and read what it ever will, since no file can be opened afterwards."""
    with contextlib.suppress(TemplateFailure):
        LocalRenderer("{{ strftime_now('%c') }}{{ 1 // 0 }}").render({}, 100)


def _limit_this_process() -> None:
    import resource

    for limit, value in (
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        # standard input, output and error are open, and nothing else will be
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _next_request(stream: BinaryIO) -> dict[str, Any] | None:
    header = stream.read(4)
    if len(header) < 4:
        return None
    message = json.loads(stream.read(*struct.unpack("<I", header)))
    assert isinstance(message, dict)
    return message
