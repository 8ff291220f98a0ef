"""trackio: its own store on this machine, or a Space."""

from __future__ import annotations

import contextvars
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.tracking.run import Status, TrackedRun, metrics_of, recipe_of

__all__ = ["ToTrackio", "check"]


def check(cfg: RunConfig) -> None:
    """Refuse to start where a Space can't be written.

    Raises:
        UserError: naming what to set.
    """
    from huggingface_hub import get_token

    if cfg.trackio_space_id is not None and get_token() is None:
        raise UserError("trackio_space_id: a Space needs a token of Hugging Face; set HF_TOKEN or log in with `hf auth login`")


class ToTrackio:
    """Reports to trackio, which knows runs by their names and has no word for how one ended."""

    label = "trackio"

    def __init__(self) -> None:
        self.link: str | None = None

    def start(self, run: TrackedRun) -> dict[str, Any]:
        """Begin the run, or go on with the one of the same name."""
        import trackio

        cfg = run.cfg
        project = cfg.trackio_project_name or "prefray"
        name = run.kept.get("name") or _free(run.name(cfg.trackio_run_name), project, cfg.trackio_space_id)
        # In a context of its own: trackio would end the run that was begun before it in the same one.
        with _quiet():
            self._run = contextvars.copy_context().run(
                trackio.init,
                project=project,
                name=name,
                group=run.group(cfg.trackio_run_name),
                space_id=cfg.trackio_space_id,
                config=recipe_of(cfg),
                resume="allow",
                embed=False,
            )
        self.link = cfg.trackio_space_id or f"trackio show --project {project}"
        return {"name": self._run.name, "id": self._run.id}

    def log(self, records: list[dict[str, Any]]) -> None:
        """Log each record at its optimizer step."""
        for record in records:
            self._run.log(metrics_of(record), step=record["step"])

    def add_checkpoint(self, name: str) -> None:
        """Nothing: trackio is for metrics."""

    def finish(self, status: Status) -> None:
        """Write what is left."""
        with _quiet():
            self._run.finish()


def _free(name: str, project: str, space_id: str | None) -> str:
    """The name, with a number where a run of this machine has it already: going on with that one is not meant."""
    import trackio

    taken: set[str] = set()
    if space_id is None:
        with suppress(ValueError):  # of a project that doesn't exist yet
            taken = {run.name for run in trackio.Api().runs(project)}
    names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 2))]
    return next(one for one in names if one not in taken)


@contextmanager
def _quiet() -> Iterator[None]:
    """trackio prints what our display says."""
    with redirect_stdout(io.StringIO()):
        yield
