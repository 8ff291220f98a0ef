"""`RunConfig`: every package's keys in one strict class."""

from __future__ import annotations

from pydantic import Field, PrivateAttr

from pipeline.config.selection import SelectConfig
from pipeline.config.tuning import TuneConfig
from pipeline.data.keys import DataConfig

__all__ = ["RunConfig"]


class RunConfig(DataConfig):
    """A validated recipe: Axolotl's keys, `ray:`, `select:` and `tune:`."""

    select: SelectConfig | None = Field(
        None, description="Train on a part of the training rows, by a column of `prefray inspect`; all rows when not set."
    )
    tune: TuneConfig | None = Field(
        None, description="Search space and settings of `prefray tune`; `prefray train` ignores it."
    )
    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def notes(self) -> tuple[str, ...]:
        """Keys that were translated to others, or left out, each as a sentence."""
        return self._notes
