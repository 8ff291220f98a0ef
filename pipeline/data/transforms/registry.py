"""The dataset types by name: those of this package, and those that are registered from outside."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.data.transforms import chat, trl_shapes, turns, user_defined
from pipeline.data.transforms.base import Context, Rendered, Row, RowError
from pipeline.errors import UserError
from strategies.base import BatchKind
from strategies.registering import RegistrationError, claim, described

__all__ = ["FACTORIES", "Factory", "OutsideType", "TypeFailed", "dataset_types", "outside_type", "register_dataset_type"]

Factory = Callable[[Context], Callable[[Row], Rendered]]
"""Makes the function that turns raw rows of a dataset into text."""

_HOMES = (turns, chat, user_defined, trl_shapes)
FACTORIES: dict[BatchKind, dict[str, Factory]] = {
    "pair": {name: factory for home in _HOMES for name, factory in home.PAIR_TYPES.items()},
    "unpaired": {name: factory for home in _HOMES for name, factory in home.UNPAIRED_TYPES.items()},
    "prompt": {name: factory for home in _HOMES for name, factory in home.PROMPT_TYPES.items()},
}
"""What a raw row holds -> name -> factory."""
_BUILT_IN = {kind: frozenset(factories) for kind, factories in FACTORIES.items()}
_SEQUENCES: dict[BatchKind, int] = {"pair": 2, "unpaired": 1, "prompt": 0}


@dataclass(frozen=True)
class OutsideType:
    """A dataset type that was registered."""

    name: str
    factory: Factory
    kind: BatchKind
    keys: frozenset[str]
    version: str | None

    def code(self) -> str:
        """What stands for its code in the fingerprint of prepared data: its version, or a hash of the file that defines it.

        Raises:
            UserError: for a function without a file, which workers couldn't import either.
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
        """Its function for a dataset, whose failures are said under its name.

        Raises:
            UserError: when the factory fails.
            TypeFailed: (from the returned function) when that fails.
            RowError: (from the returned function) for a row that can't be used.
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
    """A registered dataset type failed at a row, which whoever reads the rows can name."""


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
        name: of the type. One name may be registered for several kinds.
        factory: `(context) -> (row) -> Rendered`: makes the function that turns a dataset's raw rows into text, which raises
            `RowError` for a row that can't be used; anything else that it raises ends `prepare`. Left out, the decorator of
            such a factory is returned.
        kind: what a raw row holds: pair, unpaired (a labelled answer, for kto), or prompt (for grpo).
        keys: keys of the dataset that it reads beside `path` and the like, such as `field_prompt`: it finds them in
            `context.keys`. Any other is refused.
        version: stands for its code: rows that were prepared by another version are prepared anew. When it isn't given, a
            change of the file that defines the factory counts as one.

    Raises:
        RegistrationError: for a name that is taken, or a kind that doesn't exist.
    """
    if kind not in FACTORIES:
        raise RegistrationError(f"dataset type {name!r}: kind must be one of {', '.join(FACTORIES)}, got {kind!r}")

    def register(factory: Factory) -> Factory:
        known = {other: one.factory for other, one in _OUTSIDE[kind].items()}
        claim("dataset type", name, factory, known, _BUILT_IN[kind])
        _OUTSIDE[kind][name] = made = OutsideType(name, factory, kind, frozenset(keys), version)
        FACTORIES[kind][name] = made.transform
        return factory

    return register if factory is None else register(factory)


def dataset_types(kind: BatchKind) -> tuple[str, ...]:
    """Names of the dataset types for what a raw row holds."""
    return tuple(sorted(FACTORIES[kind]))


def outside_type(kind: BatchKind, name: str) -> OutsideType | None:
    """The dataset type of this name, when it was registered from outside."""
    return _OUTSIDE[kind].get(name)


def _file(factory: Factory) -> str | None:
    inner = inspect.unwrap(getattr(factory, "func", factory))
    try:
        file = inspect.getsourcefile(inner if inspect.isfunction(inner) or inspect.isclass(inner) else type(inner))
    except TypeError:
        return None
    return file if file is not None and inner.__module__ != "__main__" else None
