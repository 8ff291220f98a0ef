"""Storage of runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3 import S3Server, s3_server


@pytest.fixture
def s3() -> Iterator[S3Server]:
    """A real S3 server; the test's process has its address and keys in the environment, no other process has."""
    with s3_server() as server:
        yield server
