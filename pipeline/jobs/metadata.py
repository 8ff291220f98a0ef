"""What a cluster's list of jobs says of a job of ours."""

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
from pipeline.config.secrets import redact_text
from pipeline.paths import lasting_outputs

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["job_facts", "new_name"]


def new_name(command: str, recipe: str) -> str:
    """An id that says what the job is, and that no other job has."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(recipe).stem).strip("-") or "recipe"
    return f"{command}-{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def job_facts(command: str, root: Path, recipe: str | None, cfg: RunConfig | None) -> dict[str, str]:
    """Metadata of a job: what it runs, who submitted it, from which commit; no secrets.

    Args:
        root: the working directory.
        recipe: its path there; None, as is `cfg`, for a command without one.
    """
    found = {"prefray": version("prefray"), "command": command, "submitted_by": f"{_user()}@{socket.gethostname()}"}
    if recipe is not None and cfg is not None:
        found["recipe"] = recipe
        found["config_fingerprint"] = hashlib.sha256(dump_config(cfg).encode()).hexdigest()[:16]
        found["output_dir"] = redact_text(lasting_outputs(cfg)["output_dir"])
    if (revision := _git_revision(root)) is not None:
        found["git_revision"] = revision
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user needn't have a name
        return str(os.getuid())


def _git_revision(root: Path) -> str | None:
    """The commit of the working directory, `+changes` where files differ from it; None where there is no git."""

    def git(*words: str) -> str | None:
        try:
            command = ["git", "-C", str(root), *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)  # noqa: S603
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    return f"{commit[:12]}{'+changes' if git('status', '--porcelain', '--', '.') else ''}"
