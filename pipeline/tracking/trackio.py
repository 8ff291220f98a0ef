"""trackio: a local store, or a Space of Hugging Face."""

from __future__ import annotations

import contextvars
import io
from contextlib import redirect_stdout, suppress
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.tracking.tracker import EndStatus, Tracker, metrics_of

__all__ = ["TRACKER"]


class Trackio(Tracker):
    """Reports to trackio, which identifies runs by name and has no end status."""

    label = "trackio"
    package = "trackio"
    name_key = "trackio_run_name"
    variables = ("TRACKIO_", "HF_TOKEN", "HF_HOME")

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        """Raise UserError with a remedy if a Space can't be written."""
        from huggingface_hub import get_token

        if cfg.trackio_space_id is not None and get_token() is None:
            why = "a Space needs a token of Hugging Face; set HF_TOKEN or log in with `hf auth login`"
            raise UserError(f"trackio_space_id: {why}")

    def start(self) -> None:
        """Begin the run, or resume the one of the same name."""
        import trackio

        project, space_id = self.cfg.trackio_project_name or "prefray", self.cfg.trackio_space_id
        name = self.saved.get("name") or (self.name if space_id else _unused_name(self.name, project))
        # Silenced, since the display shows the link. A context of its own, since `init` ends another run of its context.
        with redirect_stdout(io.StringIO()):
            self._run = contextvars.copy_context().run(
                trackio.init,
                project=project,
                name=name,
                group=self.group,
                space_id=space_id,
                config=self.recipe(),
                resume="allow",
                embed=False,
            )
        self.saved = {"name": self._run.name, "id": self._run.id}
        self.link = space_id or f"trackio show --project {project}"

    def log(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self._run.log(metrics_of(record), step=record["step"])

    def finish(self, status: EndStatus) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.finish()


def _unused_name(name: str, project: str) -> str:
    """Return `name`, with a number if the local store has a run of that name: a new run mustn't resume it."""
    import trackio

    taken: set[str] = set()
    with suppress(ValueError):  # raised for a project that doesn't exist yet
        taken = {run.name for run in trackio.Api().runs(project)}
    candidates = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 2))]
    return next(candidate for candidate in candidates if candidate not in taken)


TRACKER = Trackio
