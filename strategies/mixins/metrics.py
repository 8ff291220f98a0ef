"""Metrics as means over all that was seen since the last log, on all ranks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from strategies.callbacks import StepTimer
from strategies.metrics import MetricSums, gather_means

__all__ = ["MetricsMixin"]


class MetricsMixin(Trainer):
    """Adds metrics up forward by forward, and hands their means to TRL's log: one collective per log.

    Attributes:
        answers: `strategies.answers.Answers`, where evaluations generate some.
    """

    _total_train_tokens: int
    _metrics: dict[str, dict[str, list[float]]]
    _tp_size: int

    def _start_metrics(self) -> None:
        """Before TRL's trainer is constructed."""
        self.answers: Any = None
        self._step_timer = StepTimer()
        self._sums: dict[str, MetricSums] = {"train": {}, "eval": {}}
        self._tokens_at_last_log = 0

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Go on counting tokens where the checkpoint's log left off; TRL starts again at 0."""
        found = super()._init_training_state(*args, **kwargs)
        counts = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        self._total_train_tokens = self._tokens_at_last_log = int(counts[-1]) if counts else 0
        return found

    def _record(self, sums: MetricSums, tokens: torch.Tensor, counts: bool) -> None:
        """Add this forward's (sum, count) of each metric, and its tokens, to what the next log will show.

        A forward that doesn't count adds zeros: all ranks gather the same metrics.
        """
        kept = self._sums[self._mode]
        for name, (value, count) in {**sums, "num_tokens": (tokens, torch.ones_like(tokens))}.items():
            value, count = value.detach().double(), count.double()
            if not counts:
                value, count = torch.zeros_like(value), torch.zeros_like(count)
            old = kept.get(name)
            kept[name] = (value, count) if old is None else (old[0] + value, old[1] + count)

    def _take_metrics(self) -> None:
        """Hand the means since the last log to TRL's `log`; every rank must call it."""
        mode = self._mode
        sums, self._sums[mode] = self._sums[mode], {}
        if not sums:
            return
        means, totals = gather_means(self.accelerator, sums)
        means.pop("num_tokens")
        if mode == "train":
            self._total_train_tokens += round(totals["num_tokens"]) // self._tp_size
        found = {**self._derived(means), "num_tokens": self._total_train_tokens}
        self._metrics[mode].update({name: [value] for name, value in found.items()})

    def _derived(self, means: dict[str, float]) -> dict[str, float]:
        """The means, and metrics that follow from them."""
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with `tokens_per_second`: tokens fed since the last log, by all workers, per second spent in steps.

        Of several evaluation sets each has metrics of its own name: `eval_NAME_rewards/margins`.
        """
        self._take_metrics()
        tokens = self._total_train_tokens - self._tokens_at_last_log
        if "loss" in logs and tokens and (seconds := self._step_timer.take()):
            self._tokens_at_last_log = self._total_train_tokens
            logs["tokens_per_second"] = tokens / seconds
        if self.answers is not None and self._mode == "eval":
            self.answers.add_to(logs)
        if isinstance(self.eval_dataset, dict) and self._mode == "eval":
            loss = next((name for name in logs if name.endswith("_loss")), "eval_loss")
            prefix = loss.removeprefix("eval_").removesuffix("loss")
            renamed = {prefix + name: values for name, values in self._metrics["eval"].items()}
            self._metrics["eval"].clear()
            self._metrics["eval"].update(renamed)
        if self.args.nonfinite_loss == "skip" and "loss" in logs:
            logs["skipped_steps"] = len(self.ledger.skipped)
        super().log(logs, start_time)
