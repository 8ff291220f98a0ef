"""What others add from outside: losses, strategies, callbacks. Loads without torch.

Each function registers an object under a name, and is a decorator too. `strategies.plugins` loads the modules that call them.
"""

from __future__ import annotations

import functools
import inspect
import re
import traceback
from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from strategies.base import Strategy
from strategies.errors import OutsideError
from strategies.keys import Keys
from strategies.loss_traits import LOSSES, OUTSIDE_LOSSES, LossTraits
from strategies.registry import STRATEGIES, STRATEGY_KEYS

if TYPE_CHECKING:
    from strategies.losses import PairLoss

__all__ = [
    "CALLBACKS",
    "RegistrationError",
    "claim",
    "described",
    "register_callback",
    "register_loss",
    "register_strategy",
    "registrations",
]

T = TypeVar("T")

CALLBACKS: dict[str, Callable[..., Any]] = {}
"""Module and name -> callback class, or function of the config that returns a callback."""

_REGISTERED: list[str] = []
_OWN = frozenset(STRATEGIES)
_OPTIONS = frozenset[str]().union(*(traits.reads for traits in LOSSES.values()))
_NAME = re.compile(r"[A-Za-z][\w.-]*")


class RegistrationError(ValueError):
    """Something can't be registered; the message says what and why."""


def register_loss(
    name: str,
    function: PairLoss | None = None,
    *,
    reads: Iterable[str] = ("beta",),
    reference: bool = True,
    couples: bool = False,
    lengths: bool = False,
) -> Any:
    """Make `name` a value of `dpo_loss_type`.

    Args:
        name: of the loss.
        function: `(policy, reference, options) -> losses`, as `strategies.losses.PairLoss`: the loss of each of B pairs, shape
            (B,), to be minimised. Left out, the decorator of such a function is returned.
        reads: fields of `strategies.losses.LossOptions` that change its value.
        reference: whether it compares the policy with a reference; else `reference` is None.
        couples: whether the loss of a pair depends on other pairs of the batch; it is then given whole global batches.
        lengths: whether it averages over completion tokens itself.

    Raises:
        RegistrationError: for a name that is taken, or options that don't exist.
    """
    if not isinstance(name, str):
        raise RegistrationError(f'register_loss: expected a name, got {name!r}; write @register_loss("name")')
    if unknown := sorted(set(reads) - _OPTIONS):
        raise RegistrationError(
            f"loss {name!r}: reads names {', '.join(unknown)}, which no loss has; there are {', '.join(sorted(_OPTIONS))}"
        )

    def register(function: PairLoss) -> PairLoss:
        claim("loss", name, function, OUTSIDE_LOSSES, LOSSES.keys() - OUTSIDE_LOSSES.keys())
        OUTSIDE_LOSSES[name] = _checked(name, function)
        LOSSES[name] = LossTraits(frozenset(reads), reference, couples, lengths)
        return function

    return register if function is None else register(function)


def register_strategy(strategy: type[Strategy] | None = None, *, keys: type[Keys] | None = None) -> Any:
    """Make a class of `Strategy` a value of `rl`, by its attribute `rl`.

    Args:
        strategy: the class. Left out, the decorator of one is returned.
        keys: a class of `Keys` with the config keys that the strategy brings; recipes give them beside `rl`. Each has a
            default, for recipes of other strategies have them too.

    Raises:
        RegistrationError: for a name that is taken, a class that isn't complete, or keys that can't be.
    """

    def register(strategy: type[Strategy]) -> type[Strategy]:
        _check_strategy(strategy, keys)
        claim("strategy", strategy.rl, strategy, STRATEGIES, _OWN)
        STRATEGIES[strategy.rl] = strategy
        STRATEGY_KEYS.pop(strategy.rl, None)
        if keys is not None:
            STRATEGY_KEYS[strategy.rl] = keys
        return strategy

    return register if strategy is None else register(strategy)


def register_callback(callback: Callable[..., Any]) -> Any:
    """Add a callback to every run, in each of its workers; a decorator.

    Args:
        callback: a class of `transformers.TrainerCallback`, which is called without arguments; or a function of the config
            that returns such a callback, or None for a run that doesn't want it.

    Raises:
        RegistrationError: for something else.
    """
    if not callable(callback) or getattr(callback, "__name__", "<lambda>") == "<lambda>":
        raise RegistrationError(
            f"callback {callback!r}: give a class of TrainerCallback, or a function (cfg) -> TrainerCallback that has a name"
        )
    name = _place(callback)
    _REGISTERED.append(f"callback {name}")
    CALLBACKS[name] = callback
    return callback


def claim(what: str, name: str, value: Any, known: Mapping[str, Any], built_in: Container[str]) -> None:
    """Check that a name is free for an object. The same object of the same module may come again: when that is imported anew.

    Raises:
        RegistrationError: when it isn't, or is no name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RegistrationError(f"{what} {name!r}: a name is a letter, then letters, digits, '_', '-' or '.'")
    if not callable(value):
        raise RegistrationError(f"{what} {name!r}: give a function or a class, got {type(value).__name__}")
    if name in built_in:
        raise RegistrationError(f"{what} {name!r} is built in; give yours another name")
    if name in known and known[name] is not value and _place(known[name]) != _place(value):
        raise RegistrationError(
            f"{what} {name!r} is registered twice, by {_place(known[name])} and by {_place(value)}; rename one of them"
        )
    _REGISTERED.append(f"{what} {name}")


def registrations() -> int:
    """How often something was registered in this process."""
    return len(_REGISTERED)


def _place(value: Any) -> str:
    inner = inspect.unwrap(value.func if isinstance(value, functools.partial) else value)
    return f"{inner.__module__}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"


def _check_strategy(strategy: Any, keys: type[Keys] | None) -> None:
    from strategies.config import StrategyConfig

    if not inspect.isclass(strategy) or not issubclass(strategy, Strategy):
        raise RegistrationError(f"strategy {strategy!r}: must be a class of strategies.base.Strategy")
    name = strategy.__qualname__
    wanted = ("rl", "keys", "requires_reference", "batch_kind", "best_metric")
    missing = [attribute for attribute in wanted if not hasattr(strategy, attribute)] + sorted(strategy.__abstractmethods__)
    if missing:
        raise RegistrationError(f"strategy {name}: lacks {', '.join(missing)}")
    own = {} if keys is None else keys.model_fields
    if required := [key for key, field in own.items() if field.is_required()]:
        raise RegistrationError(
            f"strategy {name}: its key {required[0]!r} needs a default, which may be None, for other recipes don't set it"
        )
    if unread := sorted(own.keys() - strategy.keys):
        raise RegistrationError(f"strategy {name}: doesn't read its own key {unread[0]!r}; add it to the attribute `keys`")
    known = {*StrategyConfig.model_fields, *own}
    if unknown := sorted(key for key in strategy.keys if key.partition(".")[0] not in known):
        raise RegistrationError(
            f"strategy {name}: reads {unknown[0]!r}, which is no key; declare it: register_strategy(keys=...)"
        )


def _checked(name: str, function: PairLoss) -> PairLoss:
    """The function; what it raises, or returns in place of a loss per pair, is said under its name."""

    @functools.wraps(function)
    def call(policy: Any, reference: Any, options: Any) -> Any:
        try:
            losses = function(policy, reference, options)
        except Exception as error:
            raise OutsideError(described(f"loss {name!r}", function, error)) from error
        wanted, got = tuple(policy.chosen.shape), getattr(losses, "shape", None)
        if got is None or tuple(got) != wanted:
            said = type(losses).__name__ if got is None else f"shape {tuple(got)}"
            raise OutsideError(
                f"loss {name!r} ({_line(function)}) must return the loss of each pair, shape {wanted}, got {said}"
            )
        return losses

    return call


def described(what: str, function: Any, error: Exception) -> str:
    """What a registered function has raised, on one line, with the line of its file."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if code and frame.filename == code.co_filename]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else _line(function)
    return f"{what} raised {type(error).__name__}: {error} ({where})"


def _line(function: Any) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else _place(function)
