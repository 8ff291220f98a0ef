"""Errors that are the user's to mend: shown as they are, without a traceback, exit status 2."""

from __future__ import annotations

__all__ = ["ConfigError", "JobEnded", "RunCancelled", "RunFailed", "RunStopped", "UserError"]


class UserError(ValueError):
    """Something given is wrong; the message says what was given, what is allowed, and what to do."""


class ConfigError(UserError):
    """The config is wrong; `problems` holds every (path, message)."""

    def __init__(self, origin: str, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        lines = "\n".join(f"  {path}: {message}" if path else f"  {message}" for path, message in problems)
        super().__init__(f"{origin}: {len(problems)} problem{'s' * (len(problems) != 1)}\n{lines}")


class JobEnded(RuntimeError):
    """A job that was followed didn't end well."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        """Exit status of its driver."""
        super().__init__(message)


class RunFailed(RuntimeError):
    """A run ended although nothing was wrong with what was asked; says what happened and what remains."""


class RunCancelled(RuntimeError):
    """A run was ended by who started it; its workers are gone, its complete checkpoints stay."""


class RunStopped(RuntimeError):
    """A run ended before its last step because it was told to; says what remains."""
