"""What a job server is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["JobRequest"]


@dataclass(frozen=True)
class JobRequest:
    """What a job server is asked to run."""

    name: str
    """The submission's id."""
    entrypoint: str
    working_dir: Path | None
    """None for a job that brings nothing but modules."""
    excludes: tuple[str, ...] = ()
    py_modules: tuple[Path, ...] = ()
    env_vars: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: int | None = None
    resources: dict[str, float] | None = None
    """What the entrypoint itself reserves; it runs on the head where it reserves nothing."""

    @property
    def runtime_env(self) -> dict[str, Any]:
        """As Ray takes it."""
        environment: dict[str, Any] = {}
        if self.working_dir is not None:
            environment = {"working_dir": str(self.working_dir), "excludes": list(self.excludes)}
        if self.py_modules:
            environment["py_modules"] = [str(module) for module in self.py_modules]
        if self.env_vars:
            environment["env_vars"] = self.env_vars
        return environment
