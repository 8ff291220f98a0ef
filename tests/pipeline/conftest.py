"""Storage of runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3 import S3Server, reach


@pytest.fixture(scope="session")
def s3_of_this_process() -> Iterator[S3Server]:
    """One server for each process of tests: some take it away for a while."""
    server = S3Server("127.0.0.1")
    yield server
    server.stop()


@pytest.fixture
def s3(s3_of_this_process: S3Server) -> Iterator[S3Server]:
    """A real S3 server; the test's process has its address and keys in the environment, no other process has."""
    with reach(s3_of_this_process):
        yield s3_of_this_process
