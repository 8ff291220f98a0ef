"""Ids and metadata of our jobs, shown in a cluster's list of jobs."""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import secrets
import socket
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import dump_config
from pipeline.config.paths import lasting_outputs
from pipeline.secrets import redact_text

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["job_facts", "new_name"]


def new_name(command: str, recipe: str) -> str:
    """Return a unique, descriptive id for a job."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(recipe).stem).strip("-") or "recipe"
    return f"{command}-{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def job_facts(command: str, root: Path, recipe: str | None, cfg: RunConfig | None) -> dict[str, str]:
    """Return the metadata of a job: command, recipe, submitter, commit; no secrets.

    Args:
        root: the working directory.
        recipe: its path in `root`; None, as is `cfg`, for a command without one.
    """
    facts = {"prefray": version("prefray"), "command": command, "submitted_by": f"{_user()}@{socket.gethostname()}"}
    if recipe is not None and cfg is not None:
        facts["recipe"] = recipe
        facts["config_fingerprint"] = hashlib.sha256(dump_config(cfg).encode()).hexdigest()[:16]
        facts["output_dir"] = redact_text(lasting_outputs(cfg)["output_dir"])
    if (revision := _git_revision(root)) is not None:
        facts["git_revision"] = revision
    return facts


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user needn't have a name
        return str(os.getuid())


def _git_revision(root: Path) -> str | None:
    """Return the commit of the working directory, with `+changes` for a modified one; None without git."""

    def git(*words: str) -> str | None:
        try:
            command = ["git", "-C", str(root), *words]
            process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)  # noqa: S603
        except (OSError, subprocess.TimeoutExpired):
            return None
        return process.stdout.strip() if process.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    return f"{commit[:12]}{'+changes' if git('status', '--porcelain', '--', '.') else ''}"
