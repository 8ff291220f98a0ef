"""Stands in for Python where Ray starts a worker: has `cluster.fork_server` run the program, and ends as it does.

Run as `python -S -E fork_client.py SOCKET PROGRAM ...`. Without a server the program is run as ever. It is started for every
worker, so it imports little.
"""

import json
import os
import socket
import sys


def main(path: str, arguments: list[str]) -> int:
    """Returns the program's exit status."""
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(path)
    except OSError:
        os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - as Ray would have
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    body = json.dumps(request).encode()
    socket.send_fds(server, [len(body).to_bytes(8)], [0, 1, 2])
    server.sendall(body)
    answer = server.recv(16)
    status = int(answer or 1)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
