"""Speed of training steps: rows and tokens per second, seconds by part, and how much of the device's peak is used."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from strategies.compat import exposed_exchange_s
from strategies.metrics import MetricSums
from strategies.mixins.clock import STEP_PARTS, StepClock
from strategies.models.peak import peak_of
from strategies.models.work import ModelWork, Tokens, work_of

__all__ = ["Speed"]

COUNTED = ("rows", "fed_tokens", "operations")
UNITS = {"pair": "pairs", "unpaired": "rows", "prompt": "completions"}
"""Kind of rows -> what is counted per second."""


class Speed:
    """Counts rows, tokens and operations of a trainer's steps, and their time.

    Args:
        trainer: a `PreferenceTrainer`, which may still be under construction.

    Attributes:
        clock: seconds by part, of this rank.
        counted: sums over all ranks that were gathered for the current log.
    """

    def __init__(self, trainer: Any) -> None:
        self.clock = StepClock()
        self.counted: dict[str, float] = {}
        self._trainer = trainer
        self._counts: dict[str, Any] = defaultdict(float)
        self._works: dict[int, ModelWork | None] = {}
        self._peak: float | None = None

    def count(self, rows: int, fed_tokens: Any, work: Tokens | None = None, *, forwards: Tokens | None = None) -> None:
        """Count one forward and backward of this rank; numbers, or scalar tensors, which are read with the next log.

        Args:
            rows: pairs, labelled completions or generated completions.
            fed_tokens: tokens fed, with padding.
            work: tokens of the policy's forward and backward.
            forwards: tokens of further forwards, such as the reference's.
        """
        model = self._work_of(self._trainer.model)
        self._counts["rows"] += rows
        self._counts["fed_tokens"] += fed_tokens
        if model is not None and work is not None:
            self._counts["operations"] += model.training(work)
        if model is not None and forwards is not None:
            reference = self._work_of(getattr(self._trainer, "ref_model", None)) or model
            self._counts["operations"] += reference.forward(forwards)

    def take_counts(self) -> MetricSums:
        """Return this rank's counts since the last call, to be summed over ranks; empty if there was no step."""
        if not self.clock.steps:
            return {}
        counts, self._counts = self._counts, defaultdict(float)
        as_sum = {"dtype": torch.double, "device": self._trainer.args.device}
        one = torch.ones((), **as_sum)
        return {f"counted {name}": (torch.as_tensor(counts[name], **as_sum), one) for name in COUNTED}

    def record(self, tokens: int) -> dict[str, float]:
        """Return the metrics of the steps since the last call.

        Args:
            tokens: of the sequences of all ranks since then, without padding.
        """
        parts, steps = self.clock.take()
        seconds = sum(parts.get(name, 0.0) for name in STEP_PARTS)
        if not steps or not seconds:
            return {}
        each = {name: parts[name] / steps for name in STEP_PARTS if name in parts}
        if (exchange := exposed_exchange_s(self._trainer.model_wrapped)) is not None and "backward" in each:
            each["exchange"] = min(exchange, each["backward"])
            each["backward"] -= each["exchange"]
        counted = {name: self.counted.get(f"counted {name}", 0.0) for name in COUNTED}
        rates = {
            "tokens_per_second": tokens / seconds,
            "fed_tokens_per_second": counted["fed_tokens"] / seconds,
            f"{UNITS[self._trainer.batch_kind]}_per_second": counted["rows"] / seconds,
        }
        result = {name: value for name, value in rates.items() if value}
        if counted["operations"]:
            result["operations/step"] = counted["operations"] / steps
            result["mfu"] = counted["operations"] / seconds / self._trainer.args.world_size / self._device_peak()
        result |= {"seconds/step": seconds / steps, **{f"seconds/{name}": value for name, value in each.items()}}
        return result | ({"save_seconds": parts["save"]} if "save" in parts else {})

    def _device_peak(self) -> float:
        if self._peak is None:
            args = self._trainer.args
            dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else self._trainer.model.dtype
            self._peak = peak_of(args.device, dtype)
        return self._peak

    def _work_of(self, model: Any) -> ModelWork | None:
        if model is None:
            return None
        if id(model) not in self._works:
            self._works[id(model)] = work_of(self._trainer.accelerator.unwrap_model(model))
        return self._works[id(model)]
