"""Search space of a sweep with conditional keys, and the recipe of a trial; loads without torch and Ray."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.config import RunConfig, parse_config
from pipeline.config.loading import apply_values
from pipeline.config.paths import absolute_models
from pipeline.config.tuning import Dimension, TuneConfig
from pipeline.errors import ConfigError, UserError
from strategies.methods.registry import STRATEGIES
from strategies.plugins import installed_plugins_only

__all__ = [
    "Values",
    "build_point",
    "check_trials",
    "combinations",
    "corners",
    "extremes",
    "grid",
    "grid_of_q",
    "perturb",
    "sample",
    "shown_value",
    "shown_values",
    "trial_recipe",
]

Values = dict[str, Any]
"""Dotted key -> value of one trial."""
MOST_CORNERS = 512
"""Combinations that are validated before a sweep starts; larger spaces are subsampled."""


def build_point(tune: TuneConfig, choose: Callable[[str, Dimension], Any]) -> Values:
    """Build the values of one trial: call `choose` for each active key, after the keys that its `when` refers to."""
    values: Values = {}
    for key in _ordered(tune):
        dimension = _active(tune.space[key], values)
        if dimension is not None:
            values[key] = choose(key, dimension)
    return values


def _ordered(tune: TuneConfig) -> list[str]:
    """Return the keys in topological order of their `when` conditions."""
    done: list[str] = []

    def append(key: str) -> None:
        for dimension in tune.space[key]:
            for other in dimension.when or {}:
                append(other)
        if key not in done:
            done.append(key)

    for key in tune.space:
        append(key)
    return done


def _active(dimensions: list[Dimension], values: Values) -> Dimension | None:
    """Return the first distribution whose conditions hold; None if the key is inactive."""
    return next((dimension for dimension in dimensions if _holds(dimension.when or {}, values)), None)


def _holds(when: dict[str, Any], values: Values) -> bool:
    return all(
        key in values and (values[key] == wanted or (isinstance(wanted, list) and values[key] in wanted))
        for key, wanted in when.items()
    )


def combinations(tune: TuneConfig, options: Callable[[str, Dimension], Iterable[Any]]) -> Iterator[Values]:
    """Yield every combination of the `options` of the active keys."""
    keys = _ordered(tune)

    def extend(values: Values, index: int) -> Iterator[Values]:
        if index == len(keys):
            yield values
            return
        key = keys[index]
        dimension = _active(tune.space[key], values)
        if dimension is None:
            yield from extend(values, index + 1)
            return
        for value in options(key, dimension):
            yield from extend({**values, key: value}, index + 1)

    return extend({}, 0)


def grid(tune: TuneConfig) -> list[Values]:
    """Return every combination of a space of lists."""
    return list(combinations(tune, lambda key, dimension: dimension.values))


def corners(tune: TuneConfig) -> list[Values]:
    """Return combinations to validate a space by: both ends of ranges, one interior point, and every value of lists.

    Large spaces are subsampled.
    """
    has_ranges = any(not dimension.is_list for dimensions in tune.space.values() for dimension in dimensions)
    inside = combinations(tune, lambda key, dimension: interior(dimension)) if has_ranges else iter(())
    return [*_corners(tune), *itertools.islice(inside, MOST_CORNERS // 4)]


def _corners(tune: TuneConfig) -> list[Values]:
    # The product of many keys may be too long to list: only its beginning is drawn from.
    points = list(itertools.islice(combinations(tune, lambda key, dimension: extremes(dimension)), 20 * MOST_CORNERS))
    if len(points) <= MOST_CORNERS:
        return points
    # Too many combinations: vary each key alone, so that every value occurs, and add random combinations.
    single = [build_point(tune, _fixed(key, index)) for key in tune.space for index in range(_most_values(tune.space[key]))]
    # A fixed seed: a recipe is refused or accepted the same way each time.
    return single + random.Random(0).sample(points, MOST_CORNERS - min(len(single), MOST_CORNERS))


def _most_values(dimensions: list[Dimension]) -> int:
    return max(len(extremes(dimension)) for dimension in dimensions)


def _fixed(key: str, index: int) -> Callable[[str, Dimension], Any]:
    """Return a `choose` that takes the extreme of `key` at `index`, and the first one of every other key."""

    def choose(name: str, dimension: Dimension) -> Any:
        values = extremes(dimension)
        return values[min(index, len(values) - 1)] if name == key else values[0]

    return choose


def extremes(dimension: Dimension) -> list[Any]:
    """Return all values of a list, or the least and the greatest value of a range."""
    if dimension.is_list:
        return list(dimension.values)
    if dimension.kind == "randint":
        low, high = dimension.values
        # `high` is excluded, as in Python's ranges.
        return [low] if high == low + 1 else [low, high - 1]
    if dimension.kind == "quniform":
        steps = grid_of_q(dimension)
        return [steps[0], steps[-1]]
    return list(dimension.values)


def interior(dimension: Dimension) -> list[Any]:
    """Return all values of a list, or one inside a range: a key that needs whole numbers fails there."""
    if dimension.is_list:
        return list(dimension.values)
    if dimension.kind in ("randint", "quniform"):
        return extremes(dimension)[:1]
    low, high = dimension.values
    return [low + 0.382 * (high - low)]


def grid_of_q(dimension: Dimension) -> list[float]:
    """Return the values of a `quniform`: the multiples of q in its range."""
    low, high, q = dimension.values
    # Division of floats: 0.3 / 0.1 is 2.9999999999999996, and 3 * 0.1 isn't 0.3.
    first, last = math.ceil(low / q - 1e-9), math.floor(high / q + 1e-9)
    return [round(number * q, 12) for number in range(first, last + 1)] or [low]


def perturb(tune: TuneConfig, values: Values, rng: random.Random) -> Values:
    """Perturb the values of a good trial for one that resumes from its checkpoint (PBT, arXiv 1711.09846).

    Numbers are multiplied by 0.8 or 1.2 and clipped to their range; list values move to a neighbour; with probability
    0.25 a value is resampled.
    """

    def choose(key: str, dimension: Dimension) -> Any:
        if key not in values or rng.random() < 0.25:
            return sample(dimension, rng)
        if dimension.is_list:
            options = dimension.values
            if values[key] not in options:
                return sample(dimension, rng)
            index = options.index(values[key]) + rng.choice((-1, 1))
            return options[min(max(index, 0), len(options) - 1)]
        least, most = extremes(dimension)[0], extremes(dimension)[-1]
        value = min(max(values[key] * rng.choice((0.8, 1.2)), least), most)
        if dimension.kind == "quniform":
            return min(grid_of_q(dimension), key=lambda multiple: abs(multiple - value))
        return round(value) if dimension.kind == "randint" else value

    return build_point(tune, choose)


def sample(dimension: Dimension, rng: random.Random) -> Any:
    """Sample a value of a distribution."""
    if dimension.is_list:
        return rng.choice(dimension.values)
    if dimension.kind == "randint":
        return rng.randrange(*dimension.values)
    if dimension.kind == "quniform":
        return rng.choice(grid_of_q(dimension))
    low, high = dimension.values
    if dimension.kind == "loguniform":
        # exp(log(x)) may differ from x in the last digit, which would leave the range.
        return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)
    return rng.uniform(low, high)


def trial_recipe(cfg: RunConfig, values: Values | None, output_dir: str) -> RunConfig:
    """Return the recipe of one trial.

    Args:
        cfg: the sweep's recipe.
        values: the trial's values. Searched keys not in it keep the recipe's value, or are dropped if the trial's strategy
            does not use them. None for the baseline.
        output_dir: the trial's folder.

    Raises:
        ConfigError: for an invalid combination of values.
    """
    assert cfg.tune is not None
    # Without defaults: set for another strategy, they would be refused as keys without an effect.
    recipe = cfg.model_dump(mode="json", exclude_unset=True)
    recipe.pop("tune")
    if values is not None:
        rl: str = values.get("rl") or cfg.rl
        foreign = [key for key in cfg.tune.space if key not in values and _is_foreign(key, rl)]
        # None stands for a key that isn't set.
        recipe = apply_values(recipe, {**dict.fromkeys(foreign), **values})
    # Plugins are loaded already, with the sweep's recipe: one that is edited meanwhile must not end the sweep.
    with installed_plugins_only():
        # The sweep's own paths are absolute, and a searched one may be the same as one of these.
        return absolute_models(parse_config({**recipe, "output_dir": output_dir}, origin="trial"))


def _is_foreign(key: str, rl: str) -> bool:
    """Return whether only other strategies use a key."""
    return rl in STRATEGIES and key not in STRATEGIES[rl].keys and any(key in strategy.keys for strategy in STRATEGIES.values())


def check_trials(cfg: RunConfig, points: Iterable[Values]) -> list[RunConfig]:
    """Return the recipes of trials with these values.

    Raises:
        ConfigError: with all problems of the recipes, each at its key of the space.
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
    """Map a problem of a trial's recipe to the key of the space that causes it."""
    key = next((key for key in tune.space if path == key or path.startswith(f"{key}.")), None)
    key = key or next((key for key in tune.space if key.startswith(f"{path}.")), None)
    if key is not None:
        names_value = "unknown key" in message or ", got " in message
        prefix = f"{values[key]!r}: " if key in values and not names_value else ""
        others = {name: value for name, value in values.items() if name in message and name != key}
        hint = "; a `when` sets a key only where it has an effect" if "no effect" in message else ""
        beside = f" (beside {shown_values(others)}{hint})" if others else ""
        return f"tune.space.{key}", f"{prefix}{message}{beside}"
    return path, f"{message} (in a trial of {shown_values(values)})"


def shown_value(value: Any) -> str:
    """Format a value for display."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " + ".join(value)
    return value if isinstance(value, str) else json.dumps(value)


def shown_values(values: Values | None) -> str:
    """Format a trial's values on one line."""
    if values is None:
        return "the recipe's own values"
    return ", ".join(f"{key}: {shown_value(value)}" for key, value in values.items())
