"""A run as its host knows it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.training.slot_launch import SlotWanted

__all__ = ["HostedRun"]


@dataclass
class HostedRun:
    """A run that waits for a slot, or has one."""

    wanted: SlotWanted
    failures: int = 0
    """Failures that count for it, on all of its hosts."""
    is_leaving: bool = False
    """Whether it was asked to leave."""

    @property
    def name(self) -> str:
        """Its own among all runs."""
        return self.wanted.name

    @property
    def restarts(self) -> int:
        """Restarts that it has left."""
        return max(0, int(self.wanted.job.cfg.ray.max_failures) - self.failures)

    @property
    def folder(self) -> str:
        """Its output folder."""
        return str(self.wanted.job.cfg.output_dir)

    @property
    def is_abandoned(self) -> bool:
        """Whether no process handles its events any more."""
        return self.wanted.driver.has_ended() or not self.wanted.events.folder.exists()

    @property
    def scratch(self) -> str:
        """Name of its scratch folders."""
        return self.wanted.job.scratch
