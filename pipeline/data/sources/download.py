"""Download of a file by HTTP, of limited size and duration."""

from __future__ import annotations

import time
from functools import cache

import httpx

from pipeline.errors import UserError

__all__ = ["HTTP", "download"]

HTTP = ("http://", "https://")
CONNECT_TIMEOUT, TIMEOUT = 10.0, 120.0
"""Seconds until a host must have answered, and until it must have sent all."""


def download(url: str, most: int) -> bytes:
    """Return the bytes at a URL; redirects are followed.

    Raises:
        UserError: for more than `most` bytes, as the host says or sends them, and for no URL.
        httpx.HTTPError: for a host that can't be reached, an answer that is no file, and one that takes too long.
    """
    end = time.monotonic() + TIMEOUT
    # Not packed, so that a piece in memory is as large as what was sent.
    headers = {"Accept-Encoding": "identity"}
    try:
        with _client().stream("GET", url, headers=headers) as response:
            response.raise_for_status()
            if int(response.headers.get("Content-Length") or 0) > most:
                raise UserError(f"it has more than {most >> 20} MiB")
            pieces, size = list[bytes](), 0
            for piece in response.iter_bytes():
                pieces.append(piece)
                size += len(piece)
                if size > most:
                    raise UserError(f"it has more than {most >> 20} MiB")
                if time.monotonic() > end:
                    raise httpx.ReadTimeout(f"not all of it came within {TIMEOUT:.0f} s")
    except httpx.InvalidURL as error:
        raise UserError(str(error)) from error
    return b"".join(pieces)


@cache
def _client() -> httpx.Client:
    """Return the process's client, which any number of threads may use."""
    return httpx.Client(timeout=httpx.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT), follow_redirects=True)
