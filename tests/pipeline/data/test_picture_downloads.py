"""Pictures by HTTP: several at once, and none larger than it may be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.pictures import IMAGES, picture_path
from pipeline.data.sources.pictures import THREADS, PictureReader
from pipeline.data.transforms.base import RowError
from tests.pipeline.data.test_pictures import BLUE, ONE, RED, first, prepared, reasons

PIECE = b"x" * 1000


class Pictures(BaseHTTPRequestHandler):
    """`/red/N`: a picture, once several are asked for; `/says`, `/sends`: too much; `/moved`: elsewhere."""

    together = threading.Barrier(2, timeout=20)
    sent = 0

    def do_GET(self) -> None:
        kind = self.path.split("/")[1].lower()
        if kind == "red" and self.path.endswith(("/1", "/2")):
            self.together.wait()  # a client that asks for one after the other would never pass
        self.send_response(302 if kind == "moved" else 200)
        length = {"says": 1 << 40, "red": len(RED), "blue": len(BLUE)}
        for name, value in {"Content-Length": length.get(kind), "Location": "/blue" if kind == "moved" else None}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        try:
            for piece in {"red": [RED], "blue": [BLUE], "sends": [PIECE] * 1_000_000}.get(kind, []):
                self.wfile.write(piece)
                Pictures.sent += len(piece)
        except OSError:  # the client has gone
            return

    def log_message(self, *_: Any) -> None:
        return


@contextmanager
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def test_several_are_fetched_at_once_and_each_row_gets_its_own(tmp_path: Path) -> None:
    """The scheme's case doesn't matter; two requests wait for each other here."""
    names = ["red/0", "red/1", "red/2", "moved", "blue", "red/3", "red/0"]
    with server() as host:
        store = prepared(tmp_path, [{"image": f"HTTP://{host}/{name}", **ONE} for name in names])
    assert first(store)
    found = [picture_path(store.path, row[IMAGES][0]).read_bytes() for row in store.read().to_pylist()]
    assert found == [BLUE if name in ("moved", "blue") else RED for name in names]


def test_what_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the host says so, nor where it just sends."""
    monkeypatch.setattr("pipeline.data.sources.pictures.MAX_BYTES", 1 << 20)
    with server() as host:
        store = prepared(tmp_path, [{"image": f"http://{host}/{name}", **ONE} for name in ("says", "sends", "blue")])
    assert len(reasons(store)) == 2 and all("it has more than 1 MiB" in reason for reason in reasons(store))
    # Of a gigabyte; what is on its way when the client goes is in buffers.
    assert Pictures.sent < 1 << 28


def test_a_row_that_is_rejected_keeps_nothing_in_memory(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    with server() as host:
        reader, row = PictureReader(f"http://{host}"), ["none://host/a.png", "blue", f"http://{host}/red/0", "red/3"]
        reader.read_ahead(row)
        assert len(reader._ahead) == 4  # relative ones too, where the data are
        with pytest.raises(RowError, match="none://host/a.png"):
            reader.read(row[0])
        assert reader.read(row[1]) == BLUE and reader.read(row[3]) == RED
        reader.forget(row)
        assert not reader._ahead and THREADS > 1
    local = PictureReader(str(tmp_path))
    local.read_ahead(["red.png", f"FILE://{tmp_path}/red.png", RED])
    assert not local._ahead and local.read(f"FILE://{tmp_path}/red.png") == RED
