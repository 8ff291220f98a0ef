"""Errors with messages for users: shown without a traceback; a `UserError` ends with exit status 2."""

from __future__ import annotations

__all__ = ["ConfigError", "JobEnded", "RunCancelled", "RunFailed", "RunStopped", "UserError"]


class UserError(ValueError):
    """Invalid input; the message states what was given, what is allowed, and what to do."""


class ConfigError(UserError):
    """Invalid config; `problems` holds every (path, message)."""

    def __init__(self, origin: str, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        lines = "\n".join(f"  {path}: {message}" if path else f"  {message}" for path, message in problems)
        super().__init__(f"{origin}: {len(problems)} problem{'s' * (len(problems) != 1)}\n{lines}")


class JobEnded(RuntimeError):
    """A followed job has failed or was stopped."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        """Exit status of its driver."""
        super().__init__(message)


class RunFailed(RuntimeError):
    """A run with valid input failed; the message states what happened and what remains."""


class RunCancelled(RuntimeError):
    """A run was cancelled by its caller; its workers have ended, its complete checkpoints stay."""


class RunStopped(RuntimeError):
    """A run was stopped before its last step, by a signal; the message states what remains."""
