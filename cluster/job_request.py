"""What a job server is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.packaging import Package

__all__ = ["JobRequest"]


@dataclass(frozen=True)
class JobRequest:
    """What a job server is asked to run."""

    name: str
    """The submission's id."""
    entrypoint: str
    package: Package | None
    """The files of the working directory; None for a job that brings nothing but modules."""
    py_modules: tuple[Path, ...] = ()
    env_vars: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: int | None = None
    resources: dict[str, float] | None = None
    """What the entrypoint itself reserves; it runs on the head where it reserves nothing."""

    @property
    def reserved(self) -> dict[str, float]:
        """What the entrypoint reserves, by Ray's names."""
        named = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": self.memory}
        return {**{name: amount for name, amount in named.items() if amount}, **(self.resources or {})}

    def runtime_env(self, archive: Path) -> dict[str, Any]:
        """As Ray takes it.

        Args:
            archive: where to pack the working directory.
        """
        environment: dict[str, Any] = {"excludes": ["__pycache__"]}
        if self.package is not None:
            self.package.write(archive)
            environment["working_dir"] = str(archive)
        if self.py_modules:
            environment["py_modules"] = [str(module) for module in self.py_modules]
        if self.env_vars:
            environment["env_vars"] = self.env_vars
        return environment
