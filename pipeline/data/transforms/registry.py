"""Registry of dataset types: built-in ones, and those registered by plugins."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.data.transforms import chat, chat_formats, trl_shapes, user_defined
from pipeline.data.transforms.base import Context, Rendered, Row, RowError
from pipeline.errors import UserError
from strategies.outside import RegistrationError, claim, described
from strategies.types import BatchKind

__all__ = ["FACTORIES", "Factory", "OutsideType", "TypeFailed", "dataset_types", "outside_type", "register_dataset_type"]

Factory = Callable[[Context], Callable[[Row], Rendered]]
"""Builds the function that converts raw rows of a dataset to text."""

_MODULES = (chat_formats, chat, user_defined, trl_shapes)
FACTORIES: dict[BatchKind, dict[str, Factory]] = {
    "pair": {name: factory for module in _MODULES for name, factory in module.PAIR_TYPES.items()},
    "unpaired": {name: factory for module in _MODULES for name, factory in module.UNPAIRED_TYPES.items()},
    "prompt": {name: factory for module in _MODULES for name, factory in module.PROMPT_TYPES.items()},
}
"""Kind of raw row -> name -> factory."""
# Taken before any plugin registers, so that `claim` can distinguish built-in names from registered ones.
_BUILT_IN = {kind: frozenset(factories) for kind, factories in FACTORIES.items()}
_SEQUENCES: dict[BatchKind, int] = {"pair": 2, "unpaired": 1, "prompt": 0}


@dataclass(frozen=True)
class OutsideType:
    """A dataset type registered by a plugin."""

    name: str
    factory: Factory
    kind: BatchKind
    keys: frozenset[str]
    version: str | None

    def code(self) -> str:
        """Return the identity of its code for the fingerprint: its version, or a hash of the file that defines it.

        Raises:
            UserError: for a factory without a file, which workers couldn't import either.
        """
        if self.version is not None:
            return f"version {self.version}"
        file = _file(self.factory)
        if file is None:
            raise UserError(
                f"type: {self.name!r} is defined by no file that workers could import; write it to a module, and name that "
                "in `plugins`"
            )
        with open(file, "rb") as source:
            return hashlib.sha256(source.read()).hexdigest()

    def transform(self, context: Context) -> Callable[[Row], Rendered]:
        """Build its function for a dataset, with errors that name the type.

        Raises:
            UserError: when the factory fails.
            TypeFailed: (from the returned function) when the function fails.
            RowError: (from the returned function) for an invalid row.
        """
        try:
            render = self.factory(context)
        except Exception as error:
            raise UserError(f"type: {described(self._what, self.factory, error)}") from error
        if not callable(render):
            raise UserError(f"type: {self._what} must return a function of a row, got {type(render).__name__}")

        def checked(row: Row) -> Rendered:
            try:
                rendered = render(row)
            # An invalid row is data; any other exception is the plugin's fault and ends the stage.
            except RowError:
                raise
            except Exception as error:
                raise TypeFailed(f"type: {described(self._what, render, error)}") from error
            if (problem := self._problem(rendered)) is not None:
                raise TypeFailed(f"type: {self._what} must return {problem}")
            return rendered

        return checked

    @property
    def _what(self) -> str:
        return f"dataset type {self.name!r}"

    def _problem(self, rendered: Any) -> str | None:
        if not isinstance(rendered, Rendered):
            return f"a Rendered, as pair_text and its like make, got {type(rendered).__name__}"
        fits = len(rendered.sequences) == _SEQUENCES[self.kind]
        if not fits or (rendered.label is not None) != (self.kind == "unpaired"):
            return f"rows of kind {self.kind!r}, got {len(rendered.sequences)} sequences and label {rendered.label}"
        return None


class TypeFailed(UserError):
    """A registered dataset type failed at a row; the reader of the rows adds which."""


_OUTSIDE: dict[BatchKind, dict[str, OutsideType]] = {kind: {} for kind in FACTORIES}


def register_dataset_type(
    name: str,
    factory: Factory | None = None,
    *,
    kind: BatchKind = "pair",
    keys: Iterable[str] = (),
    version: str | None = None,
) -> Any:
    """Make `name` a value of a dataset's `type`.

    Args:
        name: name of the type. One name may be registered for several kinds.
        factory: `(context) -> (row) -> Rendered`: builds the function that converts a dataset's raw rows to text, which
            raises `RowError` for an invalid row; any other exception ends `prepare`. Without it, a decorator for such a
            factory is returned.
        kind: kind of a raw row: pair, unpaired (a labelled completion, for kto), or prompt (for grpo).
        keys: keys of the dataset that it reads from `context.keys`, such as `field_prompt`, besides `path` etc. Other keys
            are rejected.
        version: version of its code: rows prepared by another version are prepared again. By default, a hash of the file
            that defines the factory.

    Raises:
        RegistrationError: for a name in use, or an unknown kind.
    """
    if kind not in FACTORIES:
        raise RegistrationError(f"dataset type {name!r}: kind must be one of {', '.join(FACTORIES)}, got {kind!r}")

    def register(factory: Factory) -> Factory:
        # A module that is loaded twice may register the same factory again; another one under its name is refused by `claim`.
        existing = {other: registered.factory for other, registered in _OUTSIDE[kind].items()}
        claim("dataset type", name, factory, existing, _BUILT_IN[kind])
        _OUTSIDE[kind][name] = registered = OutsideType(name, factory, kind, frozenset(keys), version)
        FACTORIES[kind][name] = registered.transform
        return factory

    return register if factory is None else register(factory)


def dataset_types(kind: BatchKind) -> tuple[str, ...]:
    """Return the sorted names of the dataset types for a kind of raw row."""
    return tuple(sorted(FACTORIES[kind]))


def outside_type(kind: BatchKind, name: str) -> OutsideType | None:
    """Return the registered dataset type of this name; None for built-in and unknown ones."""
    return _OUTSIDE[kind].get(name)


def _file(factory: Factory) -> str | None:
    # `func` is that of functools.partial.
    inner = inspect.unwrap(getattr(factory, "func", factory))
    try:
        file = inspect.getsourcefile(inner if inspect.isfunction(inner) or inspect.isclass(inner) else type(inner))
    except TypeError:
        return None
    # What a notebook or script defines has a file, but workers can't import `__main__`.
    return file if file is not None and inner.__module__ != "__main__" else None
