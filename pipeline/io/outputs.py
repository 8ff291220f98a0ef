"""Where results can't be written to."""

from __future__ import annotations

from urllib.parse import urlsplit

from pipeline.errors import UserError
from pipeline.io.filesystems import is_uri

__all__ = ["check_output"]


def check_output(location: str) -> None:
    """Raise UserError for a URI of results that holds a password, since it is written to config.yaml and shown, or memory."""
    if is_uri(location) and urlsplit(location).password is not None:
        raise UserError(
            "the URI holds a key, and is written to config.yaml; leave it out, and give keys in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3)"
        )
    if location.startswith("memory://"):
        raise UserError(f"{location!r} is the memory of one process; give a path, or the URI of a store")
    if location.lower().startswith(("http://", "https://")):
        raise UserError(f"{location!r} is a web address, where nothing can be written; give a path, or the URI of a store")
