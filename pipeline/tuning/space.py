"""The space of a sweep: which values its keys can have together, and the recipe of a trial; needs no torch and no ray."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.config import RunConfig, parse_config
from pipeline.config.loading import apply_values
from pipeline.config.tuning import Dimension, TuneConfig
from pipeline.errors import ConfigError, UserError
from strategies.registry import STRATEGIES

__all__ = [
    "Values",
    "check_trials",
    "combinations",
    "corners",
    "draw",
    "explore",
    "extremes",
    "grid",
    "multiples",
    "shown_value",
    "shown_values",
    "trial_recipe",
    "walk",
]

Values = dict[str, Any]
"""Dotted key -> value, of one trial."""
MOST_CORNERS = 512
"""Combinations that are tried out before a sweep starts; of larger spaces, so many by chance."""


def walk(tune: TuneConfig, choose: Callable[[str, Dimension], Any]) -> Values:
    """The values of one trial: `choose` is asked for each key that is set, after those that its `when` names."""
    values: Values = {}
    for key in _ordered(tune):
        dimension = _active(tune.space[key], values)
        if dimension is not None:
            values[key] = choose(key, dimension)
    return values


def _ordered(tune: TuneConfig) -> list[str]:
    """Keys, each after those that it depends on."""
    done: list[str] = []

    def place(key: str) -> None:
        for dimension in tune.space[key]:
            for other in dimension.when or {}:
                place(other)
        if key not in done:
            done.append(key)

    for key in tune.space:
        place(key)
    return done


def _active(dimensions: list[Dimension], values: Values) -> Dimension | None:
    """The distribution whose conditions hold; the first one, if several do."""
    return next((one for one in dimensions if _holds(one.when or {}, values)), None)


def _holds(when: dict[str, Any], values: Values) -> bool:
    return all(
        key in values and (values[key] == wanted or (isinstance(wanted, list) and values[key] in wanted))
        for key, wanted in when.items()
    )


def combinations(tune: TuneConfig, options: Callable[[str, Dimension], Iterable[Any]]) -> Iterator[Values]:
    """Every combination of the `options` of each key that is set."""
    keys = _ordered(tune)

    def extend(values: Values, place: int) -> Iterator[Values]:
        if place == len(keys):
            yield values
            return
        key = keys[place]
        dimension = _active(tune.space[key], values)
        if dimension is None:
            yield from extend(values, place + 1)
            return
        for value in options(key, dimension):
            yield from extend({**values, key: value}, place + 1)

    return extend({}, 0)


def grid(tune: TuneConfig) -> list[Values]:
    """Every combination of a space of lists."""
    return list(combinations(tune, lambda key, dimension: dimension.values))


def corners(tune: TuneConfig) -> list[Values]:
    """Combinations that a space is tried out by: both ends of ranges and every value of lists, and one point between the ends.

    Of very many a part, by chance.
    """
    has_ranges = any(not one.is_list for dimensions in tune.space.values() for one in dimensions)
    inside = combinations(tune, lambda key, dimension: interior(dimension)) if has_ranges else iter(())
    return [*_corners(tune), *itertools.islice(inside, MOST_CORNERS // 4)]


def _corners(tune: TuneConfig) -> list[Values]:
    found = list(itertools.islice(combinations(tune, lambda key, dimension: extremes(dimension)), 20 * MOST_CORNERS))
    if len(found) <= MOST_CORNERS:
        return found
    single = [walk(tune, _fixed(key, index)) for key in tune.space for index in range(_most_values(tune.space[key]))]
    return single + random.Random(0).sample(found, MOST_CORNERS - min(len(single), MOST_CORNERS))


def _most_values(dimensions: list[Dimension]) -> int:
    return max(len(extremes(dimension)) for dimension in dimensions)


def _fixed(key: str, index: int) -> Callable[[str, Dimension], Any]:
    """Chooses the value of `key` at a place in its list, and the first one of all others."""

    def choose(name: str, dimension: Dimension) -> Any:
        values = extremes(dimension)
        return values[min(index, len(values) - 1)] if name == key else values[0]

    return choose


def extremes(dimension: Dimension) -> list[Any]:
    """All values of a list, the least and the greatest of a range."""
    if dimension.is_list:
        return list(dimension.values)
    if dimension.kind == "randint":
        low, high = dimension.values
        return [low] if high == low + 1 else [low, high - 1]
    if dimension.kind == "quniform":
        steps = multiples(dimension)
        return [steps[0], steps[-1]]
    return list(dimension.values)


def interior(dimension: Dimension) -> list[Any]:
    """All values of a list, one between the ends of a range: what wants whole numbers shows there."""
    if dimension.is_list:
        return list(dimension.values)
    if dimension.kind in ("randint", "quniform"):
        return extremes(dimension)[:1]
    low, high = dimension.values
    return [low + 0.382 * (high - low)]


def multiples(dimension: Dimension) -> list[float]:
    """The values of a quniform: multiples of q in its range."""
    low, high, q = dimension.values
    first, last = math.ceil(low / q - 1e-9), math.floor(high / q + 1e-9)
    return [round(number * q, 12) for number in range(first, last + 1)] or [low]


def explore(tune: TuneConfig, values: Values, chance: random.Random) -> Values:
    """Values near those of a good trial, for one that goes on from its checkpoint (PBT, arXiv 1711.09846).

    Numbers are multiplied by 0.8 or 1.2, inside their range; of lists a neighbour is taken; one time in four a value is
    drawn anew.
    """

    def choose(key: str, dimension: Dimension) -> Any:
        if key not in values or chance.random() < 0.25:
            return draw(dimension, chance)
        if dimension.is_list:
            options = dimension.values
            if values[key] not in options:
                return draw(dimension, chance)
            place = options.index(values[key]) + chance.choice((-1, 1))
            return options[min(max(place, 0), len(options) - 1)]
        least, most = extremes(dimension)[0], extremes(dimension)[-1]
        value = min(max(values[key] * chance.choice((0.8, 1.2)), least), most)
        if dimension.kind == "quniform":
            return min(multiples(dimension), key=lambda one: abs(one - value))
        return round(value) if dimension.kind == "randint" else value

    return walk(tune, choose)


def draw(dimension: Dimension, chance: random.Random) -> Any:
    """A value by chance."""
    if dimension.is_list:
        return chance.choice(dimension.values)
    if dimension.kind == "randint":
        return chance.randrange(*dimension.values)
    if dimension.kind == "quniform":
        return chance.choice(multiples(dimension))
    low, high = dimension.values
    if dimension.kind == "loguniform":
        return min(max(math.exp(chance.uniform(math.log(low), math.log(high))), low), high)
    return chance.uniform(low, high)


def trial_recipe(cfg: RunConfig, values: Values | None, output_dir: str) -> RunConfig:
    """The recipe of one trial.

    Args:
        cfg: the sweep's.
        values: of the trial; searched keys that are not among them keep the recipe's value, unless the trial's strategy
            doesn't know them. None for the recipe's own values.
        output_dir: the trial's folder.

    Raises:
        ConfigError: for values that don't go together.
    """
    assert cfg.tune is not None
    recipe = cfg.model_dump(mode="json", exclude_unset=True)
    recipe.pop("tune")
    if values is not None:
        rl = values.get("rl", cfg.rl)
        foreign = [key for key in cfg.tune.space if key not in values and _is_foreign(key, rl)]
        recipe = apply_values(recipe, {**dict.fromkeys(foreign), **values})
    return parse_config({**recipe, "output_dir": output_dir}, origin="trial")


def _is_foreign(key: str, rl: str) -> bool:
    """Whether a key is one of other strategies than this."""
    return rl in STRATEGIES and key not in STRATEGIES[rl].keys and any(key in one.keys for one in STRATEGIES.values())


def check_trials(cfg: RunConfig, points: Iterable[Values]) -> list[RunConfig]:
    """The recipes of trials with these values.

    Raises:
        ConfigError: with what the config refuses, each key with the value that it was given.
    """
    assert cfg.tune is not None
    problems: dict[str, str] = {}
    recipes = []
    for values in points:
        try:
            recipes.append(trial_recipe(cfg, values, cfg.output_dir))
        except ConfigError as error:
            for path, message in error.problems:
                problems.setdefault(*_blame(path, message, values, cfg.tune))
        except UserError as error:  # a path that runs into a value
            problems.setdefault("tune.space", str(error))
    if problems:
        raise ConfigError("tune", sorted(problems.items()))
    return recipes


def _blame(path: str, message: str, values: Values, tune: TuneConfig) -> tuple[str, str]:
    """A problem of a trial's recipe as one of the space that it came from."""
    key = next((key for key in tune.space if path == key or path.startswith(f"{key}.")), None)
    key = key or next((key for key in tune.space if key.startswith(f"{path}.")), None)
    if key is not None:
        is_told = "unknown key" in message or ", got " in message
        given = f"{values[key]!r}: " if key in values and not is_told else ""
        others = {name: value for name, value in values.items() if name in message and name != key}
        hint = "; a `when` sets a key only where it has an effect" if "no effect" in message else ""
        beside = f" (beside {shown_values(others)}{hint})" if others else ""
        return f"tune.space.{key}", f"{given}{message}{beside}"
    return path, f"{message} (in a trial of {shown_values(values)})"


def shown_value(value: Any) -> str:
    """A value as a person reads it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return " + ".join(value)
    return value if isinstance(value, str) else json.dumps(value)


def shown_values(values: Values | None) -> str:
    """A trial's values on one line."""
    if values is None:
        return "the recipe's own values"
    return ", ".join(f"{key}: {shown_value(value)}" for key, value in values.items())
