"""`rl: kto`: Kahneman-Tversky optimisation (arXiv 2402.01306): single completions, each good or bad."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from strategies import trainers
from strategies.keys import Keys, key
from strategies.methods.base import LABELLED_METRICS, Strategy, given_arguments, of_evaluation
from strategies.methods.reference_sync import SYNC_KEYS, sync_arguments

__all__ = ["KTOKeys", "KTOStrategy"]


class KTOKeys(Keys):
    """Keys of KTO."""

    kto_desirable_weight: float | None = key("Weight of the rows whose label is true; 1 when not set.", ge=0)
    kto_undesirable_weight: float | None = key("Weight of the rows whose label is false; 1 when not set.", ge=0)


# config key -> field of AxolotlKTOConfig
ARGUMENTS = {
    "rl_beta": "beta",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    "sequence_len": "max_length",
    "disable_dropout": "disable_dropout",
}


class KTOStrategy(Strategy):
    """Labelled completions, compared with a reference policy and with the batch's divergence from it."""

    rl = "kto"
    keys = frozenset({*KTOKeys.model_fields, "rl_beta", "disable_dropout", "dpo_generate_during_eval", *SYNC_KEYS})
    requires_reference = True
    batch_kind = "unpaired"
    best_metric = "eval_rewards/margins"

    @classmethod
    def get_trainer_class(cls) -> type:
        """Return `AxolotlKTOTrainer`."""
        return trainers.AxolotlKTOTrainer

    @classmethod
    def get_training_args_class(cls) -> type:
        """Return `AxolotlKTOConfig`."""
        return trainers.AxolotlKTOConfig

    @classmethod
    def set_training_args_kwargs(cls, cfg: Any) -> dict[str, Any]:
        """Return the arguments of `AxolotlKTOConfig` that the method's keys set."""
        return {**given_arguments(cfg, ARGUMENTS), **sync_arguments(cfg)}

    @classmethod
    def evaluation_metrics(cls, cfg: Any) -> tuple[str, ...]:
        """Return the metrics of labelled completions, and the KL term."""
        extra = ["answer_length"] if cfg.dpo_generate_during_eval else []
        return of_evaluation(*LABELLED_METRICS, "kl", *extra)

    @classmethod
    def find_problems(cls, cfg: Any) -> Iterator[tuple[str, str]]:
        """Yield (path, message) for weights that leave nothing to learn."""
        if cfg.kto_desirable_weight == 0 and cfg.kto_undesirable_weight == 0:
            yield "kto_undesirable_weight", "both weights are 0, so nothing would be learned; make one of them positive"

    @classmethod
    def find_batch_problems(cls, cfg: Any, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield (path, message) for a global batch of one row, which has no mismatched completion to estimate KL with."""
        if cfg.micro_batch_size * cfg.gradient_accumulation_steps * world_size < 2:
            yield (
                "micro_batch_size",
                "kto estimates the KL term from the other completions of the global batch, which has one row; make "
                "micro_batch_size x gradient_accumulation_steps x workers 2 or more (the paper uses 8 or more)",
            )

    @classmethod
    def notes(cls, cfg: Any, column: Callable[[str], Sequence[Any]]) -> Iterator[str]:
        """Yield advice if weight x number of the good rows is not 1 to 4/3 times that of the bad ones (equation 8)."""
        labels = column("label")
        good = sum(map(bool, labels))
        bad = len(labels) - good
        weights = [1.0 if weight is None else weight for weight in (cfg.kto_desirable_weight, cfg.kto_undesirable_weight)]
        # A weight of 0 leaves one kind of rows out, on purpose.
        if not (good and bad and all(weights)):
            return
        ratio = weights[0] * good / (weights[1] * bad)
        # A ratio that is shown as 1.00 or 1.33 gets no advice.
        if not 0.995 <= ratio <= 4 / 3 + 0.005:
            yield (
                f"kto: {good} good and {bad} bad rows, weight x number {ratio:.2f} to 1; the paper advises 1 to 1.33, here "
                f"kto_desirable_weight {weights[1] * bad / good:.2f} to {weights[1] * bad / good * 4 / 3:.2f}"
            )
