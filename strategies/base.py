"""What a strategy declares. One strategy is one file: its keys, its arguments, its trainer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from strategies.keys import Keys, key

__all__ = [
    "LABELLED_METRICS",
    "PAIR_ARGUMENTS",
    "PAIR_KEYS",
    "BatchKind",
    "MethodKeys",
    "PairKeys",
    "PairStrategy",
    "ReferenceMode",
    "Strategy",
    "given_arguments",
    "of_evaluation",
]

TRL_BETA = 0.1

BatchKind = Literal["pair", "unpaired", "prompt"]
"""What one row holds: two answers of which one is better, one labelled answer, or a prompt alone."""


ReferenceMode = Literal["live", "cached"]
"""Where the reference's log-probabilities come from: a model beside the policy, or what the score stage has computed."""


class MethodKeys(Keys):
    """`rl:`, and the keys that mean the same to every strategy that reads them."""

    rl: str = key("The strategy that is trained: dpo, ipo, simpo, orpo, kto or grpo.", "dpo")
    rl_beta: PositiveFloat | None = key(
        "beta: how far the policy may leave the reference (dpo, ipo, kto: 0.1 when not set; grpo: 0, no reference); "
        "simpo: scale of the reward (2.0); orpo: weight of the odds ratio (0.1)."
    )
    disable_dropout: bool = key("Turn dropout off in policy and reference, so that their ratio is exact.", True)


class PairKeys(Keys):
    """How pairs become batches, for every strategy of pairs."""

    sample_packing: bool = key(
        "Pack pairs into rows of at most tokens_per_forward tokens in which a prompt stands once for both completions; "
        "false: padded batches of micro_batch_size pairs.",
        True,
    )
    tokens_per_forward: PositiveInt | None = key(
        "Most tokens of one packed row, which bounds memory; twice sequence_len, which every pair fits, when not set."
    )


class Strategy(ABC):
    """A preference-optimisation method, as the builder sees it.

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
    def set_trainer_kwargs(cls, cfg: Any) -> dict[str, Any]:
        """Arguments of the trainer itself that the method's keys set.

        Raises:
            ValueError: naming the key whose value can't be had.
        """
        return {}

    @classmethod
    def reward_scale(cls, cfg: Any) -> float:
        """beta, by which implicit rewards are scaled: the config's, or the strategy's own, or TRL's default."""
        return cls.set_training_args_kwargs(cfg).get("beta") or TRL_BETA

    @classmethod
    def batch_arguments(cls, cfg: Any, world_size: int) -> dict[str, Any]:
        """Arguments that fix the global batch of so many workers, whatever the number that runs."""
        return {}

    @classmethod
    def uses_reference(cls, cfg: Any) -> bool:
        """Whether this run needs the reference; never where `requires_reference` is False."""
        return cls.requires_reference

    @classmethod
    def reference_mode(cls, cfg: Any) -> ReferenceMode | None:
        """Where the reference comes from, as the config says or by default; None where none is used."""
        return "live" if cls.uses_reference(cfg) else None

    @classmethod
    @abstractmethod
    def evaluation_metrics(cls, cfg: Any) -> tuple[str, ...]:
        """Names of what every evaluation of this run reports, such as `eval_loss`."""

    @classmethod
    def sequences_per_epoch(cls, num_rows: int, cfg: Any, world_size: int) -> int:
        """Rows that pass through the model in one epoch over `num_rows` prepared rows."""
        return num_rows

    @classmethod
    def steps_per_epoch(cls, num_rows: int, cfg: Any, world_size: int) -> int:
        """Optimizer steps of one epoch over `num_rows` prepared rows.

        `dataloader_drop_last` leaves out rows that don't fill one forward on every worker, not those that don't fill a
        global batch.
        """
        forwards = cls.sequences_per_epoch(num_rows, cfg, world_size) / (cfg.micro_batch_size * world_size)
        whole = math.floor(forwards) if cfg.dataloader_drop_last else math.ceil(forwards)
        return max(1, math.ceil(whole / cfg.gradient_accumulation_steps))

    @classmethod
    def find_problems(cls, cfg: Any) -> Iterator[tuple[str, str]]:
        """Yield (path, message) for method keys that contradict each other."""
        yield from ()

    @classmethod
    def find_batch_problems(cls, cfg: Any, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield (path, message) for batch sizes that don't work with this number of workers."""
        yield from ()

    @classmethod
    def notes(cls, cfg: Any, column: Callable[[str], Sequence[Any]]) -> Iterator[str]:
        """Yield what a person should know before training on these rows.

        Args:
            column: values of a column of the training rows, by its name.
        """
        yield from ()


PAIR_KEYS = frozenset({"rl_beta", "disable_dropout", "truncation_mode", "dpo_generate_during_eval", *PairKeys.model_fields})
"""Keys that every strategy of pairs reads."""

PAIR_ARGUMENTS = {
    "sequence_len": "max_length",
    "disable_dropout": "disable_dropout",
    "truncation_mode": "truncation_mode",
    "sample_packing": "sample_packing",
    "tokens_per_forward": "tokens_per_forward",
}
"""Config key -> field of AxolotlDPOConfig, for every strategy of pairs."""


LABELLED_METRICS = tuple(
    "loss entropy rewards/chosen rewards/rejected rewards/margins logps/chosen logps/rejected logits/chosen "
    "logits/rejected".split()
)
"""What is reported of good and bad completions, by TRL's names."""


def of_evaluation(*names: str) -> tuple[str, ...]:
    """The names under which an evaluation reports metrics."""
    return tuple(f"eval_{name}" for name in names)


class PairStrategy(Strategy):
    """A strategy whose loss is one of `strategies.losses.PAIR_LOSSES`."""

    @classmethod
    def get_trainer_class(cls) -> type:
        """`AxolotlDPOTrainer`; it takes no reference where the strategy has none."""
        from strategies.trainers.pair import AxolotlDPOTrainer

        return AxolotlDPOTrainer

    @classmethod
    def get_training_args_class(cls) -> type:
        """`AxolotlDPOConfig`."""
        from strategies.training_args import AxolotlDPOConfig

        return AxolotlDPOConfig

    @classmethod
    def evaluation_metrics(cls, cfg: Any) -> tuple[str, ...]:
        """Of pairs, beside those of completions, how often the chosen one is preferred."""
        beside = ["kl"] if cls.uses_reference(cfg) else ["nll_loss"]
        beside += ["answer_length"] if cfg.dpo_generate_during_eval else []
        return of_evaluation(*LABELLED_METRICS, "rewards/accuracies", "mean_token_accuracy", *beside)

    @classmethod
    def steps_per_epoch(cls, num_rows: int, cfg: Any, world_size: int) -> int:
        """Steps of the batch plan: global batches, of which `dataloader_drop_last` leaves out one that isn't full."""
        from strategies.batching import BatchPlan

        size = cls.batch_arguments(cfg, world_size)["global_batch_size"]
        return BatchPlan(num_rows, size, seed=None, drop_last=cfg.dataloader_drop_last).steps_per_epoch

    @classmethod
    def batch_arguments(cls, cfg: Any, world_size: int) -> dict[str, Any]:
        """The size of the global batch, which is all that the batch plan depends on."""
        return {"global_batch_size": cfg.micro_batch_size * cfg.gradient_accumulation_steps * world_size}


def given_arguments(cfg: Any, arguments: dict[str, str]) -> dict[str, Any]:
    """The arguments whose keys are set, for a table of key -> argument; the others keep their own default."""
    return {field: getattr(cfg, name) for name, field in arguments.items() if getattr(cfg, name) is not None}
