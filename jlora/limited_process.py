"""Runs functions of a module in a child process with limits on its time and memory.

For work whose size a file of someone else decides: chat templates, regular expressions,
tokenizers. Whatever they do, the caller gets an answer or an exception. A child that
exceeds a limit ends, and the next call starts another.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from jlora.errors import ResourceError

# A child that computes is ended by its own limit. This one is for a child that does not
# even get to compute, so a loaded machine must not reach it.
_MAX_WALL_SECONDS = 600.0
_MAX_MESSAGE = 1000
_START = "from jlora.limited_process import serve; serve()"
# What a function returns must not depend on the order of sets or on the time zone.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "TZ": "UTC"}


class LimitExceeded(Exception):
    """A call took more than its time or memory, or ended its process; says which."""


class CallError(Exception):
    """A function raised an exception, whose class has this name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class LimitedProcess:
    """A child process that calls functions of one module, of JSON values only.

    The child has nothing of the caller's memory, and ends with it. Threads may share an
    instance; a fork of the caller gets a child of its own.
    """

    def __init__(self, module: str, *, memory_bytes: int) -> None:
        """Starts nothing yet; `memory_bytes` is what the child may allocate."""
        self._module, self._memory = module, memory_bytes
        self._forget()

    def call(self, function: str, *arguments: Any, cpu_seconds: float) -> Any:
        """Returns the JSON value that a function returns; raises as `call_each`."""
        return self.call_each(function, [], [arguments], cpu_seconds=cpu_seconds)[0]

    def call_each(
        self,
        function: str,
        common: Sequence[Any],
        arguments: Sequence[Sequence[Any]],
        *,
        cpu_seconds: float,
    ) -> list[Any]:
        """Returns what a function returns for `common` and each list of more arguments.

        One message to the child and one back are faster than one for each. Each of the
        calls has `cpu_seconds`; the first that fails fails all.

        Raises:
            LimitExceeded: a limit was exceeded, or the process crashed.
            CallError: the function raised an exception.
            ResourceError: the system starts no process.
        """
        request = _to_json([function, common, arguments, cpu_seconds])
        if self._owner != os.getpid():
            self._forget()
        with self._lock:
            try:
                reply = self._exchange(request)
            except (EOFError, OSError):
                raise LimitExceeded(self._why_ended(cpu_seconds)) from None
            except BaseException:  # its answer would be taken for that of the next call
                self.close()
                raise
        if "error" not in reply:
            return reply["result"]
        if reply["error"] == "MemoryError":
            self.close()
            raise LimitExceeded(self._out_of_memory())
        raise CallError(reply["error"], reply["message"])

    def close(self) -> None:
        """Ends the child, if there is one."""
        if self._stop:
            self._stop()

    def _forget(self) -> None:
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._stop: weakref.finalize[Any, Any] | None = None

    def _exchange(self, request: bytes) -> dict[str, Any]:
        if not (self._stop and self._stop.alive and self._child.poll() is None):
            self._start()
        self._connection.send_bytes(request)
        end = time.monotonic() + _MAX_WALL_SECONDS
        # Without a limit of the system, memory is looked at often.
        step = 0.1 if sys.platform == "darwin" else _MAX_WALL_SECONDS
        while not self._connection.poll(step):
            if time.monotonic() > end or _resident_bytes(self._child) > self._memory:
                raise EOFError
        return _from_json(self._connection.recv_bytes())

    def _start(self) -> None:
        self.close()
        path = os.pathsep.join(sys.path)
        self._connection, theirs = Pipe()
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, self._module, str(self._memory)],
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for the caller, also before `serve` runs
            )
        except OSError as error:
            raise ResourceError(f"cannot start a process: {error}") from error
        finally:
            theirs.close()
        self._stop = weakref.finalize(self, _end, self._child, os.getpid())

    def _why_ended(self, cpu_seconds: float) -> str:
        """Ends what is left of the child and returns which limit it exceeded."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(1)
        status = self._child.poll()
        self.close()
        if status == -signal.SIGPROF:
            return f"it took more than {cpu_seconds:.0f} s of computing time"
        if status is None:
            return (
                f"it took more than {_MAX_WALL_SECONDS:g} s, or {self._out_of_memory()}"
            )
        return f"its process crashed (status {status}), or {self._out_of_memory()}"

    def _out_of_memory(self) -> str:
        return f"it took more than {self._memory / 2**30:g} GiB of memory"


def _end(child: subprocess.Popen[bytes], owner: int) -> None:
    if owner == os.getpid():
        child.kill()
        child.wait()


def _resident_bytes(child: subprocess.Popen[bytes]) -> int:
    """Returns the memory that a child uses, 0 if it has ended."""
    command = ["ps", "-o", "rss=", "-p", str(child.pid)]
    shown = subprocess.run(command, capture_output=True, check=False).stdout
    return int(shown or 0) << 10


# JSON may hold halves of a character, which mark control strings.
_ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False)


def _to_json(value: Any) -> bytes:
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def _from_json(data: bytes) -> Any:
    return json.loads(data.decode("utf-8", "surrogatepass"))


def serve() -> None:
    """Is the child: answers calls until the caller closes the connection."""
    module, memory = sys.argv[1], int(sys.argv[2])
    # Ctrl-C and the like are for the caller, who may still need an answer.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS
        resource.setrlimit(resource.RLIMIT_DATA, (memory, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(os.dup(0))
    while True:
        try:
            reply = _answer(module, connection.recv_bytes())
        except EOFError:
            return
        except MemoryError:
            reply = b'{"error": "MemoryError", "message": ""}'
        connection.send_bytes(reply)


def _answer(module: str, request: bytes) -> bytes:
    try:
        name, common, calls, cpu_seconds = _from_json(request)
        function = getattr(importlib.import_module(module), name)
        results = []
        for arguments in calls:
            # The system ends the process then, wherever it is. It counts computing, not
            # waiting, so that the result does not depend on how busy the machine is.
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
            results.append(function(*common, *arguments))
        return _to_json({"result": results})
    except (MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        message = str(error)[:_MAX_MESSAGE]
        return _to_json({"error": type(error).__name__, "message": message})
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
