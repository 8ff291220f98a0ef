"""Metrics as means over all rows since the last log, on all ranks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from strategies.metrics import MetricSums, gather_means
from strategies.mixins.speed import Speed

__all__ = ["MetricsMixin"]


class MetricsMixin(Trainer):
    """Sums metrics over forwards, and passes their means to TRL's log: one collective per log.

    Attributes:
        speed: time and work of the training steps since the last log.
        eval_generations: `strategies.inference.eval_generations.EvalGenerations`, if evaluations generate answers.
    """

    _total_train_tokens: int
    _metrics: dict[str, dict[str, list[float]]]
    _tp_size: int

    def _start_metrics(self) -> None:
        """Initialise; called before TRL's constructor, which may log."""
        self.speed = Speed(self)
        self._sums: dict[str, MetricSums] = {"train": {}, "eval": {}}
        self._tokens_at_last_log = 0
        self._resumed_with: dict[str, Any] | None = None

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Resume the token count from the checkpoint's log; TRL restarts it at 0."""
        state = super()._init_training_state(*args, **kwargs)
        counts = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        self._total_train_tokens = self._tokens_at_last_log = int(counts[-1]) if counts else 0
        return state

    def _unlogged(self) -> dict[str, Any]:
        """Return the sums of this rank since the last log, as JSON."""
        sums = {name: [value.item(), count.item()] for name, (value, count) in self._sums["train"].items()}
        waiting = {name: [float(value) for value in values] for name, values in self._metrics["train"].items()}
        since = self._globalstep_last_logged
        return {"loss": self._tr_loss.item(), "since": since, "sums": sums, "metrics": waiting}

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Run an epoch; in a resumed run first restore the sums that the checkpoint had not logged yet."""
        # Not before the loop: `_inner_training_loop` sets the running loss to 0 after the state is loaded.
        if (saved := self._resumed_with) is not None:
            self._resumed_with, device = None, self.args.device
            self._tr_loss, self._globalstep_last_logged = torch.tensor(saved["loss"], device=device), saved["since"]
            as_sum = {"dtype": torch.double, "device": device}
            self._sums["train"] = {
                name: (torch.tensor(value, **as_sum), torch.tensor(count, **as_sum))
                for name, (value, count) in saved["sums"].items()
            }
            self._metrics["train"].update(saved["metrics"])
        return super()._run_epoch(*args, **kwargs)

    def _record(self, sums: MetricSums, tokens: torch.Tensor, is_real: bool) -> None:
        """Add this forward's (sum, count) of each metric, and its tokens, to those of the next log.

        A forward without real rows adds zeros, so that all ranks gather the same metrics.
        """
        kept = self._sums[self._mode]
        for name, (value, count) in {**sums, "num_tokens": (tokens, torch.ones_like(tokens))}.items():
            # float64: in float32 a count of tokens loses ones above 2**24.
            value, count = value.detach().double(), count.double()
            if not is_real:
                value, count = torch.zeros_like(value), torch.zeros_like(count)
            old = kept.get(name)
            kept[name] = (value, count) if old is None else (old[0] + value, old[1] + count)

    def _take_metrics(self) -> None:
        """Pass the means since the last log to TRL's `log`. Every rank must call it."""
        mode = self._mode
        sums, self._sums[mode] = self._sums[mode], {}
        counts = self.speed.take_counts() if mode == "train" else {}
        if not sums and not counts:
            return
        means, totals = gather_means(self.accelerator, {**sums, **counts})
        self.speed.counted = {name: totals[name] / self._tp_size for name in counts}
        if not sums:
            return
        if mode == "train":
            # As TRL: ranks of one tensor-parallel group are given the same tokens.
            self._total_train_tokens += round(totals["num_tokens"]) // self._tp_size
        means = {name: value for name, value in means.items() if name not in {"num_tokens", *counts}}
        values = {**self._derived(means), "num_tokens": self._total_train_tokens}
        # Lists, since TRL's `log` averages over their items.
        self._metrics[mode].update({name: [value] for name, value in values.items()})

    def _derived(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means, with metrics derived from them; subclasses add theirs."""
        return means

    # Parts of a step, for the trainers that leave it to transformers

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Take the batches of a step."""
        with self.speed.clock.part("data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a forward and backward."""
        self.speed.clock.enter("forward")
        loss = super().training_step(*args, **kwargs)
        self.speed.clock.enter("optimizer")
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward; in training, a backward follows."""
        result = super().compute_loss(*args, **kwargs)
        if self._mode == "train":
            self.speed.clock.enter("backward")
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with tokens, rows and seconds of the steps since the last log: `strategies.mixins.speed`.

        With several evaluation sets, metrics are named by set: `eval_NAME_rewards/margins`.
        """
        self._take_metrics()
        tokens = self._total_train_tokens - self._tokens_at_last_log
        # Only in records of training steps, in which the clock runs; an evaluation's loss is `eval_loss`.
        if "loss" in logs:
            self._tokens_at_last_log = self._total_train_tokens
            logs.update(self.speed.record(tokens))
        if self.eval_generations is not None and self._mode == "eval":
            self.eval_generations.add_to(logs)
        if isinstance(self.eval_dataset, dict) and self._mode == "eval":
            # transformers names the loss by the set, and TRL's `log` only prefixes the other metrics with `eval_`.
            loss = next((name for name in logs if name.endswith("_loss")), "eval_loss")
            prefix = loss.removeprefix("eval_").removesuffix("loss")
            renamed = {prefix + name: values for name, values in self._metrics["eval"].items()}
            self._metrics["eval"].clear()
            self._metrics["eval"].update(renamed)
        if self.args.nonfinite_loss == "skip" and "loss" in logs:
            logs["skipped_steps"] = len(self.ledger.skipped)
        super().log(logs, start_time)
