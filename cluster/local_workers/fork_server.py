"""Fork server: a process that has imported the workers' libraries, and forks for each worker.

Ray starts a worker with `fork_client.py` instead of Python; the client asks this server for a fork that runs Ray's
worker program, and exits with it. So a node imports torch and transformers once, not once per worker, and a worker starts in a
fraction of a second. Ray itself must not be imported here: its extension module reads the environment of a process when it is
loaded.

`start` runs the server beside the process that starts Ray, and it ends with that process.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["start"]

HEADER = 8
"""Bytes of the length in front of a request."""

LONGEST_FOLDER = 70
"""In characters: the path of a socket may have 107."""


def start(modules: Sequence[str], environment: Mapping[str, str]) -> str:
    """Start a server that ends with this process.

    Args:
        modules: imported before the first fork.
        environment: of the server; variables that a library reads on import aren't read again in a fork.

    Returns:
        The command for `py_executable` of a runtime environment.
    """
    # TMPDIR may be long, as in a batch job, and the path of a socket is limited.
    is_short = len(tempfile.gettempdir()) < LONGEST_FOLDER
    folder = tempfile.mkdtemp(prefix="prefray-fork-", dir=None if is_short else "/tmp")  # noqa: S108 - only its owner reads it
    path = f"{folder}/socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(128)  # clients wait here while the server imports
        module = Path(__file__)
        # Not kept here: Python itself keeps the object of a running child (`subprocess._active`), and with it the pipe below.
        subprocess.Popen(  # noqa: S603 - this Python, this module
            [sys.executable, "-m", "cluster.local_workers.fork_server", folder, str(listener.fileno()), *modules],
            stdin=subprocess.PIPE,  # ends when this process does
            pass_fds=[listener.fileno()],
            env={**environment, "PYTHONPATH": os.pathsep.join([str(module.parents[2]), environment.get("PYTHONPATH", "")])},
            # Ctrl-C of the terminal is the driver's to handle, which ends its workers in order.
            start_new_session=True,
        )
    # -S and -E leave out `site` and PYTHON's variables: the client, started for every worker, needs neither.
    return shlex.join([sys.executable, "-S", "-E", str(module.with_name("fork_client.py")), path])


@dataclass(frozen=True)
class Request:
    """A program that a client asks for, with its environment."""

    arguments: list[str]
    """A Python file and its arguments."""
    environment: dict[str, str]
    folder: str
    streams: list[int]
    """Descriptors of standard input, output and error."""


@dataclass(frozen=True)
class Child:
    """A fork of this process."""

    pid: int
    handle: int
    """Descriptor (of `pidfd_open`) that becomes readable when the fork has ended."""
    client: socket.socket


def main(folder: str, listener: int, modules: list[str]) -> None:
    """Import, then fork for clients until the driver has ended; a fork runs its program, then returns as the server does."""
    ending = Ending()
    # Before the imports, whose own handlers then run earlier: the last one registered is called first.
    atexit.register(ending)
    gc.disable()  # imports leave no garbage, and collections would take a fifth of the time
    for name in modules:
        importlib.import_module(name)
    if "ray" in sys.modules:
        raise RuntimeError("Ray was imported, which copies of this process would have to do themselves")
    gc.collect()
    gc.freeze()  # a collection in a fork would write to shared pages
    request = Server(socket.socket(fileno=listener)).serve()
    if request is None:
        shutil.rmtree(folder, ignore_errors=True)
        ending.status = 0
    else:
        gc.enable()
        with ending:
            run(request)


class Ending:
    """Exit handler that ends a process without destroying its modules: in a fork that would copy every shared page.

    It is registered with `atexit` first, so it is called last: after threads have ended and other handlers have run.
    """

    status = 1

    def __enter__(self) -> None:
        """Record how the enclosed program ends: Python doesn't pass the status to exit handlers."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.status = 0
        elif isinstance(error, SystemExit):
            self.status = error.code if isinstance(error.code, int) else int(error.code is not None)

    def __call__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.status)


class Server:
    """Event loop over clients, forks that end, and the driver's end."""

    def __init__(self, listener: socket.socket) -> None:
        self._children: dict[int, Child] = {}
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        # Becomes readable when the driver has ended, in whichever way: its end of the pipe is closed then.
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, None)

    def serve(self) -> Request | None:
        """Fork for every client; return its request in the fork, and None in the server when the driver has ended."""
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return None
                if key.fd in self._watched() and (request := key.data()) is not None:
                    return request

    def _watched(self) -> set[int]:
        """Registered descriptors. An earlier event of the same `select` may have closed a later one's descriptor."""
        return {key.fd for key in self._selector.get_map().values()}

    def _accept(self) -> Request | None:
        client, _ = self._listener.accept()
        try:
            request = receive(client)
        except (OSError, ValueError):  # the client was killed
            client.close()
            return None
        try:
            pid = os.fork()
        except OSError:  # out of memory: the client exits, and Ray starts another
            for descriptor in (*request.streams, client.detach()):
                os.close(descriptor)
            return None
        if pid == 0:  # in the fork, which leaves the event loop
            self._leave(client)
            return request
        for descriptor in request.streams:
            os.close(descriptor)
        # A pidfd is waited for in `select`, as a socket is, without a signal handler or a thread, which forks would lose.
        child = Child(pid, os.pidfd_open(pid), client)
        self._selector.register(child.handle, selectors.EVENT_READ, lambda: self._ended(child))
        # A client sends nothing more: readable means that it has ended.
        self._selector.register(client, selectors.EVENT_READ, lambda: self._abandoned(child))
        self._children[pid] = child
        return None

    def _ended(self, child: Child) -> None:
        """Send the program's exit status to its client."""
        _, status = os.waitpid(child.pid, 0)
        del self._children[child.pid]
        self._selector.unregister(child.handle)
        os.close(child.handle)
        if child.client.fileno() in self._watched():
            self._selector.unregister(child.client)
        with suppress(OSError):  # the client has ended too
            child.client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        child.client.close()

    def _abandoned(self, child: Child) -> None:
        """Kill a program whose client was killed: Ray knows the client's process only."""
        self._selector.unregister(child.client)
        os.kill(child.pid, signal.SIGKILL)  # not reaped yet, so the pid can't be another process's

    def _leave(self, client: socket.socket) -> None:
        """Close the server's descriptors in a fork."""
        # A fork inherits all descriptors: an open one would keep other clients' connections from closing.
        self._selector.close()
        self._listener.close()
        client.close()
        for child in self._children.values():
            os.close(child.handle)
            child.client.close()


def receive(client: socket.socket) -> Request:
    """Read a client's request.

    Raises:
        ValueError: where it ends too soon.
    """
    # The loop serves one client at a time: one that hangs must not stop the others for good.
    client.settimeout(30)
    # Descriptors come with the first bytes of a message.
    data, streams, _, _ = socket.recv_fds(client, HEADER, 3)
    if len(data) < HEADER or len(streams) < 3:
        raise ValueError("a request without a header")
    size = int.from_bytes(data)
    body = bytearray()
    while len(body) < size:
        part = client.recv(size - len(body))
        if not part:
            raise ValueError("a request that was cut off")
        body += part
    client.settimeout(None)
    return Request(**json.loads(body), streams=streams)


def run(request: Request) -> None:
    """Run the client's program in this fork, with its streams, folder and environment."""
    os.setpgid(0, 0)  # Ray kills a worker's whole process group
    for target, descriptor in enumerate(request.streams):
        os.dup2(descriptor, target)
    for descriptor in request.streams:
        if descriptor > 2:
            os.close(descriptor)
    os.chdir(request.folder)
    # Those are the server's; Ray has set this worker's in the client.
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv = request.arguments
    # As Python does for a program; the server, started with -m, has its working directory there.
    sys.path[0] = str(Path(request.arguments[0]).parent)
    _reset_libraries()
    runpy.run_path(request.arguments[0], run_name="__main__")


def _reset_libraries() -> None:
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # all forks would draw the same random numbers


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
