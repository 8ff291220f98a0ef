"""What a strategy declares. One strategy is one file: its keys, its arguments, its trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

__all__ = ["Strategy"]


class Strategy(ABC):
    """A preference-optimisation method, as the builder sees it.

    Subclasses set every class attribute; none has a default that could be inherited by accident.
    """

    rl: ClassVar[str]
    """Value of `rl:` that selects the strategy."""
    keys: ClassVar[frozenset[str]]
    """Method keys (`strategies.config.method`) that the strategy reads."""
    requires_reference: ClassVar[bool]
    """Whether the loss compares the policy with a reference policy."""
    batch_kind: ClassVar[Literal["pair", "unpaired", "prompt"]]
    """What one prepared row holds."""

    @classmethod
    @abstractmethod
    def get_trainer_class(cls) -> type:
        """The trainer that `HFRLTrainerBuilder.build` instantiates."""

    @classmethod
    @abstractmethod
    def get_training_args_class(cls) -> type:
        """The dataclass of that trainer's arguments."""

    @classmethod
    @abstractmethod
    def set_training_args_kwargs(cls, cfg: Any) -> dict[str, Any]:
        """Arguments that the method's keys set, for `get_training_args_class()`."""

    @classmethod
    def find_problems(cls, cfg: Any) -> Iterator[tuple[str, str]]:
        """Yield (path, message) for method keys that contradict each other."""
        yield from ()
