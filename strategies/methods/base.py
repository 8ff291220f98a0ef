"""Base classes of strategies. One strategy is one file: its keys, its arguments, its trainer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ClassVar

from pydantic import PositiveFloat, PositiveInt

from strategies import trainers
from strategies.batch.plan import BatchPlan
from strategies.keys import Keys, key, options_of
from strategies.types import BatchKind, ReferenceMode

__all__ = [
    "LABELLED_METRICS",
    "PAIR_ARGUMENTS",
    "PAIR_KEYS",
    "MethodKeys",
    "PairKeys",
    "PairStrategy",
    "Strategy",
    "given_arguments",
    "of_evaluation",
    "pair_arguments",
]

TRL_BETA = 0.1


class MethodKeys(Keys):
    """`rl:`, and the keys with the same meaning for every strategy that reads them."""

    rl: str = key("The strategy to train: dpo, ipo, simpo, orpo, kto or grpo.", "dpo")
    rl_beta: PositiveFloat | None = key(
        "beta: strength of the constraint to the reference (dpo, ipo, kto: 0.1 when not set; grpo: 0, no reference); "
        "simpo: scale of the reward (2.0); orpo: weight of the odds ratio (0.1).",
        option="beta",
    )
    disable_dropout: bool = key("Turn dropout off in policy and reference, so that their ratio is exact.", True)


class PairKeys(Keys):
    """Batching of pairs, for every pair strategy."""

    sample_packing: bool = key(
        "Pack pairs into rows of at most tokens_per_forward tokens, with the prompt once for both completions; "
        "false: padded batches of micro_batch_size pairs.",
        True,
    )
    tokens_per_forward: PositiveInt | None = key(
        "Maximum tokens of one packed row, which bounds memory; twice sequence_len, which every pair fits, when not set."
    )


class Strategy(ABC):
    """Interface of a preference-optimisation method to the builder.

    Subclasses set every class attribute; none has a default that could be inherited by accident.
    """

    rl: ClassVar[str]
    """Value of `rl:` that selects the strategy."""
    keys: ClassVar[frozenset[str]]
    """Method keys that the strategy reads; those of a section as `section.key`."""
    requires_reference: ClassVar[bool]
    """Whether the loss compares the policy with a reference policy."""
    batch_kind: ClassVar[BatchKind]
    """What one row holds."""
    best_metric: ClassVar[str]
    """Metric that the best checkpoint is chosen by when the config doesn't name one."""

    @classmethod
    @abstractmethod
    def get_trainer_class(cls) -> type:
        """Return the trainer class that `HFRLTrainerBuilder.build` instantiates."""

    @classmethod
    @abstractmethod
    def get_training_args_class(cls) -> type:
        """Return the dataclass of that trainer's arguments."""

    @classmethod
    @abstractmethod
    def set_training_args_kwargs(cls, cfg: Any) -> dict[str, Any]:
        """Return the arguments of `get_training_args_class()` that the method's keys set."""

    @classmethod
    def set_trainer_kwargs(cls, cfg: Any) -> dict[str, Any]:
        """Return the arguments of the trainer itself that the method's keys set.

        Raises:
            ValueError: naming the key whose value is not available.
        """
        return {}

    @classmethod
    def reward_scale(cls, cfg: Any) -> float:
        """Return beta, the scale of implicit rewards: the config's, or the strategy's default, or TRL's."""
        return cls.set_training_args_kwargs(cfg).get("beta") or TRL_BETA

    @classmethod
    def batch_arguments(cls, cfg: Any, world_size: int) -> dict[str, Any]:
        """Return arguments that fix the global batch to that of `world_size` workers, whatever the actual number."""
        return {}

    @classmethod
    def uses_reference(cls, cfg: Any) -> bool:
        """Return whether this run needs the reference; never if `requires_reference` is False."""
        return cls.requires_reference

    @classmethod
    def reference_mode(cls, cfg: Any) -> ReferenceMode | None:
        """Return the source of the reference, by the config or by default; None if none is used."""
        return "live" if cls.uses_reference(cfg) else None

    @classmethod
    @abstractmethod
    def evaluation_metrics(cls, cfg: Any) -> tuple[str, ...]:
        """Return the names of the metrics that every evaluation of this run reports, such as `eval_loss`."""

    @classmethod
    def sequences_per_epoch(cls, num_rows: int, cfg: Any, world_size: int) -> int:
        """Return the rows that pass through the model in one epoch over `num_rows` prepared rows."""
        return num_rows

    @classmethod
    def steps_per_epoch(cls, num_rows: int, cfg: Any, world_size: int) -> int:
        """Return the optimizer steps of one epoch over `num_rows` prepared rows.

        `dataloader_drop_last` drops rows that don't fill one forward on every worker, not those that don't fill a global
        batch.
        """
        forwards = cls.sequences_per_epoch(num_rows, cfg, world_size) / (cfg.micro_batch_size * world_size)
        whole = math.floor(forwards) if cfg.dataloader_drop_last else math.ceil(forwards)
        # At least one, as transformers counts (`set_initial_training_values`).
        return max(1, math.ceil(whole / cfg.gradient_accumulation_steps))

    @classmethod
    def find_problems(cls, cfg: Any) -> Iterator[tuple[str, str]]:
        """Yield (path, message) for method keys that contradict each other."""
        yield from ()

    @classmethod
    def sharding_problem(cls) -> str | None:
        """Return why the model can't be sharded over the workers, in words that follow the sharding's key; None if it can."""
        return None

    @classmethod
    def find_batch_problems(cls, cfg: Any, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield (path, message) for batch sizes that don't work with this number of workers."""
        yield from ()

    @classmethod
    def notes(cls, cfg: Any, column: Callable[[str], Sequence[Any]]) -> Iterator[str]:
        """Yield notes for the user before training on these rows.

        Args:
            column: returns the values of a column of the training rows.
        """
        yield from ()


PAIR_KEYS = frozenset({"rl_beta", "disable_dropout", "truncation_mode", "dpo_generate_during_eval", *PairKeys.model_fields})
"""Keys that every pair strategy reads."""

PAIR_ARGUMENTS = {
    "rl_beta": "beta",
    "sequence_len": "max_length",
    "disable_dropout": "disable_dropout",
    "truncation_mode": "truncation_mode",
    "sample_packing": "sample_packing",
    "tokens_per_forward": "tokens_per_forward",
}
"""Config key -> field of AxolotlDPOConfig, for every pair strategy."""


LABELLED_METRICS = tuple(
    "loss entropy rewards/chosen rewards/rejected rewards/margins logps/chosen logps/rejected logits/chosen "
    "logits/rejected".split()
)
"""Metrics of chosen and rejected completions, by TRL's names."""


def of_evaluation(*names: str) -> tuple[str, ...]:
    """Return the names under which an evaluation reports metrics."""
    return tuple(f"eval_{name}" for name in names)


class PairStrategy(Strategy):
    """A strategy whose loss is one of `strategies.losses.PAIR_LOSSES`."""

    @classmethod
    def get_trainer_class(cls) -> type:
        """Return `AxolotlDPOTrainer`."""
        return trainers.AxolotlDPOTrainer

    @classmethod
    def get_training_args_class(cls) -> type:
        """Return `AxolotlDPOConfig`."""
        return trainers.AxolotlDPOConfig

    @classmethod
    def evaluation_metrics(cls, cfg: Any) -> tuple[str, ...]:
        """Return the metrics of completions and of pairs, such as accuracies."""
        # As `AxolotlDPOTrainer._record_batch` records them.
        extra = ["kl"] if cls.uses_reference(cfg) else ["nll_loss"]
        extra += ["answer_length"] if cfg.dpo_generate_during_eval else []
        return of_evaluation(*LABELLED_METRICS, "rewards/accuracies", "mean_token_accuracy", *extra)

    @classmethod
    def steps_per_epoch(cls, num_rows: int, cfg: Any, world_size: int) -> int:
        """Return the steps of the batch plan; `dataloader_drop_last` drops a global batch that isn't full."""
        size = cls.batch_arguments(cfg, world_size)["global_batch_size"]
        # The number of steps doesn't depend on the order of rows, so no seed.
        return BatchPlan(num_rows, size, seed=None, drop_last=cfg.dataloader_drop_last).steps_per_epoch

    @classmethod
    def batch_arguments(cls, cfg: Any, world_size: int) -> dict[str, Any]:
        """Return the size of the global batch; the batch plan depends on nothing else of these."""
        return {"global_batch_size": cfg.micro_batch_size * cfg.gradient_accumulation_steps * world_size}


def given_arguments(cfg: Any, arguments: dict[str, str]) -> dict[str, Any]:
    """Map the config keys that are set to training arguments; unset keys keep the argument's default."""
    return {field: getattr(cfg, name) for name, field in arguments.items() if getattr(cfg, name) is not None}


def pair_arguments(cfg: Any, keys: Collection[str], arguments: dict[str, str]) -> dict[str, Any]:
    """Map the keys of a pair strategy that are set to arguments of `AxolotlDPOConfig`.

    Args:
        cfg: a validated config.
        keys: those that the strategy reads.
        arguments: key -> argument. Keys without one that set options of losses (`key(option=...)`) make up `loss_options`.
    """
    # The options of plugins' losses; of built-in ones, each has an argument of the trainer.
    options = {
        option: getattr(cfg, name)
        for name, option in options_of(type(cfg)).items()
        if name in keys and name not in arguments and getattr(cfg, name) is not None
    }
    return given_arguments(cfg, arguments) | ({"loss_options": options} if options else {})
