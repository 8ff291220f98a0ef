"""Filesystems of paths and URIs, with the retries and keys that each process needs."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import UserError
from pipeline.io.fsspec_errors import WithOSErrors
from pipeline.io.storage_keys import hand_over, take

__all__ = [
    "S3_HINT",
    "S3_KEYS",
    "S3_VARIABLES",
    "RetryingS3",
    "fail_fast",
    "for_other_processes",
    "is_uri",
    "resolve",
    "retrying_s3",
    "store_options",
]

INTERACTIVE_TIMEOUT = timedelta(seconds=20)
"""How long Google's client may retry while a user waits for a command to start, or a task for a picture; its default is 15
minutes."""
PYARROWS = ("s3://", "gs://", "gcs://")
"""Beginnings of URIs that pyarrow alone opens."""
S3_ATTEMPTS = 12
"""Attempts of one request in other processes: two to three minutes of an S3 that doesn't answer."""
INTERACTIVE_S3_ATTEMPTS = 4
"""Attempts of one request while a user waits: at most 20 seconds of an S3 that doesn't answer."""
S3_SILENCE_S = 3.0
"""Seconds without a byte after which an attempt is given up."""
S3_KEYS = {
    "access_key": "AWS_ACCESS_KEY_ID",
    "secret_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
}
S3_VARIABLES = (*S3_KEYS.values(), "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")
"""Environment variables of S3: keys, region, endpoint."""
S3_HINT = (
    "S3's keys are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws, the region from AWS_DEFAULT_REGION, "
    "an endpoint that isn't Amazon's from AWS_ENDPOINT_URL"
)


def is_uri(location: str) -> bool:
    """Return whether a location has a scheme."""
    return "://" in location


def resolve(location: str) -> tuple[fs.FileSystem, str]:
    """Return the pyarrow filesystem of a path or URI, and the path in it; schemes that pyarrow doesn't support go to fsspec.

    Special characters of a URI may be escaped or not.

    Raises:
        UserError: when neither supports the scheme, or the package for it is missing.
        OSError: when opening the filesystem needs a network that doesn't answer.
    """
    if not is_uri(location):
        return fs.LocalFileSystem(), location
    if location.startswith(PYARROWS) and {".", ".."} & set(location.partition("?")[0].split("/")):
        # Clients resolve them, servers don't: each signs another name.
        raise UserError(f"cannot open {location!r}: a store has no folders '.' and '..'; write the name without them")
    try:
        # pyarrow would open it by fsspec, too, with errors of its own.
        if not location.startswith("hf://"):
            filesystem, path = fs.FileSystem.from_uri(_as_uri(location))
            return _with_few_attempts(filesystem), path
    except pa.ArrowNotImplementedError:
        pass
    except pa.ArrowInvalid as error:
        # fsspec would ask for a package, or take a query that is wrong for a part of the name.
        if location.startswith(PYARROWS):
            raise UserError(f"cannot open {location!r}: {error}") from error
    try:
        import fsspec

        # Without a cache of listings: files that other processes have written meanwhile must be visible.
        filesystem, path = fsspec.core.url_to_fs(location, use_listings_cache=False)
    except Exception as error:  # each of fsspec's clients has classes of its own
        raise UserError(f"cannot open {location!r}: {error}") from error
    return fs.PyFileSystem(fs.FSSpecHandler(WithOSErrors(filesystem))), path


def _with_few_attempts(filesystem: fs.FileSystem) -> fs.FileSystem:
    # A URI's filesystem of S3 would try for one and a half minutes, and Python's exit would wait for that.
    if not isinstance(filesystem, fs.S3FileSystem):
        return filesystem
    options = {**store_options(filesystem), "request_timeout": S3_SILENCE_S}
    return fs.S3FileSystem(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=INTERACTIVE_S3_ATTEMPTS))


def _as_uri(location: str) -> str:
    """Escape special characters of a URI's path: `#` begins no fragment, and existing escapes (`%20`) stay."""
    scheme, _, rest = location.partition("://")
    host, slash, path = rest.partition("/")
    path, mark, query = path.partition("?")
    path = quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", path), safe="/%:@!$&'()*+,;=~")
    return f"{scheme}://{host}{slash}{path}{mark}{query}"


def fail_fast(filesystem: fs.FileSystem) -> fs.FileSystem:
    """Limit the retries of a filesystem, so that errors are reported soon; those of S3 are limited by `resolve`."""
    if isinstance(filesystem, fs.GcsFileSystem):
        options = store_options(filesystem)
        return fs.GcsFileSystem(**{**options, "retry_time_limit": options["retry_time_limit"] or INTERACTIVE_TIMEOUT})
    return filesystem


def for_other_processes(filesystem: fs.FileSystem) -> fs.FileSystem:
    """Return a filesystem of `resolve` for workers: with long retries, and this process's keys."""
    # One of `retrying_s3` has both already.
    if not isinstance(filesystem, fs.S3FileSystem) or isinstance(filesystem, RetryingS3):
        return filesystem
    options = store_options(filesystem)
    # Keys in the URI, an anonymous or an assumed role are the user's choice; otherwise workers get this environment's.
    has_credentials = options["access_key"] or options["anonymous"] or options["role_arn"]
    if not has_credentials and os.environ.get("AWS_ACCESS_KEY_ID"):
        options |= {option: os.environ.get(name) for option, name in S3_KEYS.items()}
    options["region"] = options["region"] or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "")
    return RetryingS3(**options)


class RetryingS3(fs.S3FileSystem):
    """S3 with retries for minutes; pyarrow's class loses its retry strategy when it is pickled.

    A pickle contains no keys, but the name by which other processes of this Ray find them.
    """

    def __init__(self, attempts: int | None = None, **options: Any) -> None:
        # One request for a small file, where three would announce, send and complete it.
        options["allow_delayed_open"] = True
        self.attempts = attempts or S3_ATTEMPTS
        super().__init__(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=self.attempts))

    def __reduce__(self) -> tuple[Any, ...]:
        # pyarrow's filesystems have no other way to read their options.
        options = store_options(super())
        keys = {name: value for name in S3_KEYS if (value := options.pop(name, None))}
        options["attempts"] = self.attempts
        return retrying_s3, (options, hand_over(keys) if keys else None)


def retrying_s3(options: dict[str, Any], name: str | None) -> RetryingS3:
    """Return a `RetryingS3`, with the keys of a name of `hand_over`; what its pickles call."""
    if name is None:
        return RetryingS3(**options)
    # A pickle of another Ray, whose keys are gone: use this process's.
    local = {option: os.environ[variable] for option, variable in S3_KEYS.items() if variable in os.environ}
    return RetryingS3(**{**options, **(take(name) or local)})


def store_options(filesystem: Any) -> dict[str, Any]:
    """Return the constructor arguments of a pyarrow filesystem, from its pickle."""
    reduced: Any = filesystem.__reduce__()
    return dict(reduced[1][0])
