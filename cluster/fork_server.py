"""A process that has imported what workers need, and forks itself for each of them.

A worker's process is started by Ray with `cluster/fork_client.py` in the place of Python; that asks this server for a copy of
itself which runs Ray's worker program, and ends with it. So a node imports torch and transformers once, not once per worker,
and a worker's start takes a fraction of a second. Ray itself must not be imported here: its extension module reads the
environment of a process when it is loaded.

`start` runs it beside the process that starts Ray, with which it ends.
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
"""Bytes in front of a request that say how long it is."""

LONGEST_FOLDER = 70
"""Characters: the path of a socket has 107 at most."""


def start(modules: Sequence[str], environment: Mapping[str, str]) -> str:
    """Start a server that ends with this process.

    Args:
        modules: what it imports before it forks.
        environment: its own; what a library reads when it is imported, copies don't read again.

    Returns:
        The command that Ray starts workers with in the place of Python (`py_executable` of a runtime environment).
    """
    is_short = len(tempfile.gettempdir()) < LONGEST_FOLDER
    folder = tempfile.mkdtemp(prefix="prefray-fork-", dir=None if is_short else "/tmp")  # noqa: S108 - only its owner reads it
    path = f"{folder}/socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(128)  # clients that come while it imports wait for it
        here = Path(__file__)
        subprocess.Popen(  # noqa: S603 - this Python, this module
            [sys.executable, "-m", "cluster.fork_server", folder, str(listener.fileno()), *modules],
            stdin=subprocess.PIPE,  # ends when this process does
            pass_fds=[listener.fileno()],
            env={**environment, "PYTHONPATH": os.pathsep.join([str(here.parents[1]), environment.get("PYTHONPATH", "")])},
            start_new_session=True,
        )
    return shlex.join([sys.executable, "-S", "-E", str(here.with_name("fork_client.py")), path])


@dataclass(frozen=True)
class Request:
    """What a client wants to be run, and in what surroundings."""

    arguments: list[str]
    """A Python file and what it is called with."""
    environment: dict[str, str]
    folder: str
    streams: list[int]
    """Descriptors of standard input, output and error."""


@dataclass(frozen=True)
class Child:
    """A copy of this process."""

    pid: int
    handle: int
    """Descriptor that becomes readable when the copy has ended."""
    client: socket.socket


def main(folder: str, listener: int, modules: list[str]) -> None:
    """Import, then fork until the driver has ended. Returns in the server; a copy runs its program and returns as well."""
    ending = Ending()
    atexit.register(ending)
    gc.disable()  # nothing of what is imported becomes garbage, and looking for it takes a fifth of the time
    for name in modules:
        importlib.import_module(name)
    if "ray" in sys.modules:
        raise RuntimeError("Ray was imported, which copies of this process would have to do themselves")
    gc.collect()
    gc.freeze()  # a collection would write to pages that are shared
    request = Server(socket.socket(fileno=listener)).serve()
    if request is None:
        shutil.rmtree(folder, ignore_errors=True)
        ending.status = 0
    else:
        gc.enable()
        with ending:
            run(request)


class Ending:
    """Ends a process as Python would, but for taking its modules apart: in a copy that would copy every page that is shared.

    It is registered first and so called last, when threads have ended and what libraries have registered was called.
    """

    status = 1

    def __enter__(self) -> None:
        """Around a program: how it ends is kept, for Python doesn't say it to what is called at the end."""

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
    """Waits for clients, for the ends of copies, and for the driver's end."""

    def __init__(self, listener: socket.socket) -> None:
        self._children: dict[int, Child] = {}
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, None)

    def serve(self) -> Request | None:
        """Fork for every client; returns its request in the copy, and None in the server when the driver has ended."""
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return None
                if key.fd in self._watched() and (request := key.data()) is not None:
                    return request

    def _watched(self) -> set[int]:
        """Descriptors that are waited for: an event before this one of the same moment may have closed its own."""
        return {key.fd for key in self._selector.get_map().values()}

    def _accept(self) -> Request | None:
        client, _ = self._listener.accept()
        try:
            request = receive(client)
        except (OSError, ValueError):  # of a client that was killed
            client.close()
            return None
        try:
            pid = os.fork()
        except OSError:  # no memory for one more: the client ends, and Ray starts another
            for descriptor in (*request.streams, client.detach()):
                os.close(descriptor)
            return None
        if pid == 0:
            self._leave(client)
            return request
        for descriptor in request.streams:
            os.close(descriptor)
        child = Child(pid, os.pidfd_open(pid), client)
        self._selector.register(child.handle, selectors.EVENT_READ, lambda: self._ended(child))
        self._selector.register(client, selectors.EVENT_READ, lambda: self._abandoned(child))
        self._children[pid] = child
        return None

    def _ended(self, child: Child) -> None:
        """Tell the client how its program has ended."""
        _, status = os.waitpid(child.pid, 0)
        del self._children[child.pid]
        self._selector.unregister(child.handle)
        os.close(child.handle)
        if child.client.fileno() in self._watched():
            self._selector.unregister(child.client)
        with suppress(OSError):  # of a client that has ended as well
            child.client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        child.client.close()

    def _abandoned(self, child: Child) -> None:
        """End a program whose client has been ended: Ray means the program."""
        self._selector.unregister(child.client)
        os.kill(child.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own

    def _leave(self, client: socket.socket) -> None:
        """Close, in a copy, what is the server's."""
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
    client.settimeout(30)
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
    """Become the process that the client would have been."""
    os.setpgid(0, 0)  # Ray ends a worker's whole group
    for target, descriptor in enumerate(request.streams):
        os.dup2(descriptor, target)
    for descriptor in request.streams:
        if descriptor > 2:
            os.close(descriptor)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv = request.arguments
    sys.path[0] = str(Path(request.arguments[0]).parent)
    _settle_libraries()
    runpy.run_path(request.arguments[0], run_name="__main__")


def _settle_libraries() -> None:
    """Give libraries what they would have found when they were imported by this process."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # a copy would draw the numbers of every other copy


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
