"""The `tune:` section: search space, algorithm, scheduler and metrics of a sweep. Loads without torch and without ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from strategies.keys import Keys
from strategies.methods.base import PairKeys
from strategies.methods.registry import keys_of_strategies

__all__ = ["Bounds", "Dimension", "Finalists", "TuneConfig", "find_problems", "perturbable"]

Range = tuple[float, float]
Mode = Literal["max", "min"]


class Dimension(Keys):
    """Values of one key: one distribution, by Ray Tune's names, and the condition under which the key is searched."""

    uniform: Range | None = Field(None, description="[low, high]: uniform between them.")
    loguniform: Range | None = Field(None, description="[low, high]: log-uniform between them.")
    quniform: tuple[float, float, float] | None = Field(None, description="[low, high, q]: multiples of q, uniformly.")
    randint: tuple[int, int] | None = Field(None, description="[low, high]: integers from low to high - 1.")
    choice: Annotated[list[Any], Field(min_length=1)] | None = Field(
        None, description="One of these values; null omits the key."
    )
    grid: Annotated[list[Any], Field(min_length=1)] | None = Field(
        None, description="Each of these values, in every combination with other grids."
    )
    when: dict[str, Any] | None = Field(
        None,
        description="Search the key only in trials where other searched keys have these values (a list: one of them); "
        "otherwise the recipe's value applies, or the key is dropped if the trial's strategy does not use it.",
    )

    @model_validator(mode="after")
    def _check(self) -> Dimension:
        distributions = [name for name in DISTRIBUTIONS if getattr(self, name) is not None]
        if len(distributions) != 1:
            raise ValueError(f"give one of {', '.join(DISTRIBUTIONS)}, got {', '.join(distributions) or 'none'}")
        if (problem := _range_problem(self.kind, self.values)) is not None:
            raise ValueError(problem)
        return self

    @property
    def kind(self) -> str:
        """Name of the distribution."""
        return next(name for name in DISTRIBUTIONS if getattr(self, name) is not None)

    @property
    def is_list(self) -> bool:
        """Whether its values are a list (not a range)."""
        return self.kind in LISTS

    @property
    def values(self) -> Any:
        """The range, or the list of values."""
        return getattr(self, self.kind)


DISTRIBUTIONS = ("uniform", "loguniform", "quniform", "randint", "choice", "grid")
LISTS = ("choice", "grid")
"""Distributions that are a list of values."""


def _range_problem(kind: str, values: Any) -> str | None:
    """Return the problem of a distribution's values; None without one."""
    if kind in LISTS:
        duplicates = [value for index, value in enumerate(values) if value in values[:index]]
        return f"{kind}: {duplicates[0]!r} stands twice in {values}" if duplicates else None
    low, high = values[:2]
    if not low < high:
        return f"{kind}: the range from {low:g} to {high:g} is empty; write [low, high]"
    if kind == "loguniform" and low <= 0:
        return f"loguniform: needs a range above 0, got {low:g} to {high:g}"
    if kind == "quniform" and not 0 < values[2] <= high - low:
        return f"quniform: q must be above 0 and at most the range, got {values[2]:g}"
    return None


class Bounds(Keys):
    """Bounds of a metric that a trial must satisfy."""

    min: float | None = Field(None, description="Lower bound.")
    max: float | None = Field(None, description="Upper bound.")

    @model_validator(mode="after")
    def _check(self) -> Bounds:
        if self.min is None and self.max is None:
            raise ValueError("give min, max, or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min:g}) is above max ({self.max:g})")
        return self


class Finalists(Keys):
    """Repetition of a sweep's best trials with other seeds."""

    num: PositiveInt = Field(3, description="The best trials by the metric, as many as this.")
    # With 2 each, even if all runs of one are better than all of the other's, that has a chance of 1 in 6 between equal ones.
    seeds: int = Field(3, ge=3, description="Runs of each with other seeds; 3 are the fewest that can distinguish two trials.")


class TuneConfig(Keys):
    """The `tune:` section."""

    space: Annotated[dict[str, list[Dimension]], Field(min_length=1)] = Field(
        description="Key of the recipe -> distribution of its values, nested or dotted: {learning_rate: {loguniform: "
        "[1e-7, 1e-5]}}. A list holds several distributions of one key, each with its own `when`.",
    )
    search: Literal["random", "grid", "optuna"] = Field(
        "random",
        description="Search algorithm: random; grid (every combination of lists); optuna (tree-structured Parzen estimators, "
        "multi-objective for several metrics).",
    )
    scheduler: Literal["none", "asha", "median", "hyperband", "pbt"] = Field(
        "none",
        description="Early stopping of trials: asha and hyperband (successive halving), median (worse than the median of "
        "the others); pbt instead resumes bad trials from the checkpoints of good ones, with perturbed values.",
    )
    metric: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="Evaluation metric to optimise, or a list of them (Pareto front); the strategy's default, such as "
        "eval_rewards/accuracies, when not set.",
    )
    mode: Mode | list[Mode] | None = Field(
        None, description="max or min, for each metric; inferred from its name when not set."
    )
    constraints: dict[str, Bounds] = Field(
        default_factory=dict,
        description="Metric -> {min, max}: a trial whose last evaluation is outside can't be the best: {eval_kl: {min: -50}}.",
    )
    num_samples: PositiveInt | None = Field(
        None,
        description="Trials to sample (random: for each combination of grids); 8 when not set. grid: all combinations.",
    )
    max_concurrent_trials: PositiveInt | None = Field(
        None, description="Concurrent trials; as many as the cluster has resources for when not set."
    )
    time_budget: PositiveFloat | None = Field(None, description="Seconds after which the sweep stops, with the results so far.")
    max_failures: NonNegativeInt = Field(
        0, description="Retries of a failed trial, from its last checkpoint (workers: ray.max_failures)."
    )
    baseline: bool = Field(True, description="Trial 0 runs the recipe's values.")
    grace_period: float = Field(0.25, gt=0, le=1, description="asha, median: fraction of a run before a trial can be stopped.")
    reduction_factor: float = Field(4, gt=1, description="asha, hyperband: one of this many trials continues at each rung.")
    perturbation_interval: PositiveInt = Field(1, description="pbt: evaluations between perturbations.")
    share_base: Literal["auto"] | bool = Field(
        "auto",
        description="Trials train their adapters on one copy of the base model, in the same workers. auto: those that can, "
        "others get workers of their own; true: refuse a sweep with trials that can't; false: none.",
    )
    slots: PositiveInt | None = Field(
        None, description="Trials that share one copy of the base model at once; as many as fit the memory when not set."
    )
    finalists: Finalists | None = Field(
        None,
        description="Repeat the best trials with other seeds when the search has ended: {num: 3, seeds: 3}. The best trial is "
        "then decided by these runs alone.",
    )
    seed: NonNegativeInt | None = Field(None, description="Seed of sampling; the recipe's seed when not set.")

    # Before validation: the field's type has the flat form alone.
    @field_validator("space", mode="before")
    @classmethod
    def _flatten(cls, space: Any) -> Any:
        return dict(_flat(space)) if isinstance(space, Mapping) else space

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics in the config; empty when not set."""
        return [] if self.metric is None else [self.metric] if isinstance(self.metric, str) else self.metric


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, list of distributions) of a space with nested sections."""
    for name, value in node.items():
        path = f"{prefix}{name}"
        if _is_section(value):
            yield from _flat(value, f"{path}.")
        elif isinstance(value, list) and _are_mappings(value):
            yield path, value
        elif isinstance(value, Mapping) and value:
            yield path, [value]
        else:
            raise ValueError(f"{path}: a distribution is a mapping, such as {{choice: [1, 2]}}, got {value!r}")


def _is_section(value: Any) -> bool:
    """Return whether a mapping holds keys of the recipe, not the fields of a distribution."""
    # A mapping with any field of a distribution is one, with a typo perhaps, and validated as such.
    if not isinstance(value, Mapping) or not value or value.keys() & {*Dimension.model_fields}:
        return False
    return all(isinstance(item, Mapping) or (isinstance(item, list) and _are_mappings(item)) for item in value.values())


def _are_mappings(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(item, Mapping) for item in values)


SWEEP_KEYS = ("tune", "output_dir", "dataset_prepared_path", "ray.address")
"""Keys of the sweep as a whole, which can't be searched."""


def find_problems(tune: TuneConfig) -> Iterator[tuple[str, str]]:
    """Yield a (path, message) for every problem of the section by itself, without the rest of the recipe."""
    for key, dimensions in tune.space.items():
        if key in SWEEP_KEYS or key.startswith("tune."):
            yield f"tune.space.{key}", "belongs to the sweep as a whole and can't be searched; remove it"
        if len(dimensions) > 1 and any(dimension.when is None for dimension in dimensions):
            yield f"tune.space.{key}", "of several distributions each needs a `when`"
        for dimension in dimensions:
            yield from ((f"tune.space.{key}", text) for text in _dimension_problems(key, dimension, tune))
    if tune.search == "grid" and tune.num_samples is not None:
        yield "tune.num_samples", "has no effect with search: grid, which runs every combination; remove it"
    if tune.scheduler == "pbt":
        for key in tune.space:
            if key not in perturbable():
                yield f"tune.space.{key}", "scheduler: pbt changes values while a run goes on, and this one can't change then"
    yield from _metric_problems(tune)
    yield from _finalist_problems(tune)
    if tune.slots is not None and tune.share_base is False:
        yield "tune.slots", "has no effect with share_base: false; remove it"
    for name, schedulers in USED_BY.items():
        # Only if set: every one of these keys has a default.
        if name in tune.model_fields_set and tune.scheduler not in schedulers:
            yield f"tune.{name}", f"has no effect with scheduler: {tune.scheduler} (it belongs to {', '.join(schedulers)})"


def _finalist_problems(tune: TuneConfig) -> Iterator[tuple[str, str]]:
    if tune.finalists is None:
        return
    if len(tune.metrics) > 1:
        yield "tune.finalists", f"are compared by one metric, and there are {len(tune.metrics)}; name one, or remove the key"
    if tune.scheduler == "pbt":
        yield "tune.finalists", "scheduler: pbt changes values during a run, which no recipe repeats; remove the key"
    for key in ("seed", "split_seed"):
        if key in tune.space:
            yield f"tune.space.{key}", "finalists repeat trials with other seeds; remove it, or tune.finalists"


def perturbable() -> frozenset[str]:
    """Return the keys that may change when a run resumes, which pbt can perturb."""
    # These decide the objects that a run builds, or its data; a resumed run can't exchange them.
    fixed = {*PairKeys.model_fields, "rl", "reference", "disable_dropout", "trl.sync_ref_model", "trl.num_generations"}
    return (keys_of_strategies() | OPTIMIZATION) - fixed


OPTIMIZATION = frozenset(
    "learning_rate embedding_lr embedding_lr_scale loraplus_lr_ratio weight_decay max_grad_norm adam_beta1 adam_beta2 "
    "adam_epsilon".split()
)
USED_BY = {
    "grace_period": ("asha", "median"),
    "reduction_factor": ("asha", "hyperband"),
    "perturbation_interval": ("pbt",),
}
"""Key -> the schedulers that read it."""


def _dimension_problems(key: str, dimension: Dimension, tune: TuneConfig) -> Iterator[str]:
    for other, required in (dimension.when or {}).items():
        if other not in tune.space:
            yield f"when: {other} is not searched; name a key of tune.space"
        elif missing := _never(required, tune.space[other]):
            yield f"when: {other} is never {missing[0]!r}; its values are {_options(tune.space[other])}"
        # Each would need the other's value first.
        elif key in _conditions(other, tune):
            yield f"when: {key} and {other} depend on each other"
    if tune.search == "grid" and not dimension.is_list:
        yield f"search: grid needs a list of values, got {dimension.kind}; write grid: [...], or search: random"
    if dimension.kind == "grid" and (tune.search == "optuna" or tune.scheduler == "pbt"):
        setting = "search: optuna" if tune.search == "optuna" else "scheduler: pbt"
        yield f"{setting} chooses values itself; write choice: {dimension.values}"


def _options(dimensions: list[Dimension]) -> list[Any]:
    return [value for dimension in dimensions for value in (dimension.values if dimension.is_list else [])]


def _never(required: Any, dimensions: list[Dimension]) -> list[Any]:
    """Return the values of a condition that a key with lists of values never has."""
    # A range can't be enumerated.
    if any(not dimension.is_list for dimension in dimensions):
        return []
    options = _options(dimensions)
    # A key's values may be lists themselves; then the list is one value, not several.
    values = required if isinstance(required, list) and required not in options else [required]
    return [value for value in values if value not in options]


def _conditions(key: str, tune: TuneConfig, seen: frozenset[str] = frozenset()) -> set[str]:
    """Return the keys that a key's presence depends on, transitively, including itself."""
    if key in seen:
        return set()
    direct = {other for dimension in tune.space.get(key, []) for other in dimension.when or {}}
    # `seen` ends the recursion where conditions form a cycle.
    return {key}.union(*(_conditions(other, tune, seen | {key}) for other in direct))


def _metric_problems(tune: TuneConfig) -> Iterator[tuple[str, str]]:
    metrics, modes = tune.metrics, [tune.mode] if isinstance(tune.mode, str) else tune.mode
    if modes is not None and len(modes) != max(len(metrics), 1):
        yield "tune.mode", f"there are {max(len(metrics), 1)} metrics and {len(modes)} modes; give one for each"
    if len(set(metrics)) != len(metrics):
        yield "tune.metric", f"a metric stands twice: {', '.join(metrics)}"
    if len(metrics) > 1 and tune.scheduler != "none":
        yield "tune.scheduler", f"{tune.scheduler} compares trials by one metric, and there are {len(metrics)}; remove it"
    if tune.scheduler == "pbt" and tune.search != "random":
        yield "tune.search", f"{tune.search} doesn't go with scheduler: pbt, which changes values itself; use random"
