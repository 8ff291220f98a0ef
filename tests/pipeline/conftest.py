"""Storage of runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3 import Bucket, S3Server, bucket_of, reach, start_shared
from tests.suite.sharing import make_once


@pytest.fixture(scope="session")
def shared_s3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """How the server is reached that all processes of the tests share."""
    return make_once(tmp_path_factory, "s3", start_shared)


@pytest.fixture
def s3(shared_s3: Path) -> Iterator[Bucket]:
    """A bucket of a real S3 server; the test's process has address and keys in the environment, no other process has."""
    with bucket_of(shared_s3) as bucket:
        yield bucket


@pytest.fixture(scope="session")
def s3_of_this_process() -> Iterator[S3Server]:
    server = S3Server("127.0.0.1")
    yield server
    server.stop()


@pytest.fixture
def own_s3(s3_of_this_process: S3Server) -> Iterator[S3Server]:
    """A server of this process, as `s3`, that a test may take away for a while."""
    with reach(s3_of_this_process):
        yield s3_of_this_process
