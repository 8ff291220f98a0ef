"""Replacement for the Python executable of a Ray worker: `fork_server` runs the program, this returns its status.

Run as `python -S -E fork_client.py SOCKET PROGRAM ...`. Without a server it executes the program itself. It is started for
every worker, so it imports little.
"""

import json
import os
import socket
import sys


def main(path: str, arguments: list[str]) -> int:
    """Have the server run a program; return its exit status."""
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(path)
    except OSError:
        os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - as Ray would have
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    body = json.dumps(request).encode()
    # The worker writes to the files that Ray has opened for it, and needs no forwarding of its output.
    socket.send_fds(server, [len(body).to_bytes(8)], [0, 1, 2])
    server.sendall(body)
    # Blocks as long as the worker runs: to Ray this process is the worker, and killing it ends the other one.
    answer = server.recv(16)
    # Empty where the server has died.
    status = int(answer or 1)
    # A signal, as shells report it.
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
