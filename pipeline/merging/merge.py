"""Merges a run's adapter: finds it, merges it, compares the model with base and adapter, moves it to its destination."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin

from pipeline.doctor.machine import machine_memory
from pipeline.errors import RunFailed, UserError
from pipeline.io.remote_models import bring_weights, fetch_models
from pipeline.io.storage import locate
from pipeline.merging.output import check_free, staged
from pipeline.merging.result import MergeResult, write_card
from pipeline.merging.source import MOST_TOKENS, Source, open_source
from pipeline.reference import base_fingerprint
from pipeline.ui.display import Display
from pipeline.ui.notebook import default_display
from strategies.merging.base import memory_needed
from strategies.merging.policy import Policy
from strategies.merging.verification import Differences, compare, expected_logits
from strategies.models.processor import PROCESSOR_FILES, find_processor
from strategies.models.tokenizer import load_tokenizer
from strategies.vision.sizes import card_facts

__all__ = ["DTYPES", "merge"]

DTYPES = ("float32", "bfloat16", "float16")
SIZE = re.compile(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)


def merge(
    run_or_adapter: str | Path,
    output: str | Path | None = None,
    *,
    base: str | None = None,
    dtype: str | None = None,
    shard_size: str | int = "5GB",
    verify: bool = True,
    display: Display | None = None,
    trust: bool = False,
) -> MergeResult:
    """Merge an adapter into its base model, and compare the result with base and adapter.

    The model must fit in memory in float32.

    Args:
        run_or_adapter: `output_dir` of a finished run, or a folder with an adapter.
        output: folder or URI of the merged model; `merged` in a run's folder, `ADAPTER-merged` beside an adapter's, when None.
        base: path of the base model, where it isn't the one that the run or the adapter names.
        dtype: one of `DTYPES`, of all weights; that of each of the base's when None.
        shard_size: size of a file at most, such as "5GB", or in bytes.
        verify: compare the model with base and adapter.
        display: shows stages, progress and notes; when None, progress is shown in a notebook and nothing elsewhere.
        trust: let code run that the run's config names.

    Raises:
        UserError, ValueError: for what can't be merged, before anything is written.
        RunFailed: when the merged model differs from base and adapter by more than rounding explains, or can't be written;
            nothing is left of it then.
    """
    display = display or default_display()
    _check_options(dtype, shard_size)
    wanted = None if dtype is None else getattr(torch, dtype)
    source = open_source(str(run_or_adapter), base, trust)
    destination = output or source.output
    if destination is None:
        raise UserError(f"--output: must be given for an adapter at a URI, such as {source.given!r}")
    target = locate(str(destination))
    # Before the models are loaded.
    check_free(target)
    display.stage("reading the base model and the adapter")
    tokenizer, processor, policy = _open(source, base, display)
    # Checks the room on the disk before anything is computed.
    with staged(target, policy.nbytes(wanted)) as folder:
        # Now: merging replaces the adapter in place, after which base and adapter can't be computed.
        check = _Check(source, tokenizer, policy, display) if verify else None
        display.stage("merging")
        merged = policy.merge(wanted)
        merged.save(folder, tokenizer, shard_size, processor)
        if merged.is_untied:
            display.note(
                "embedding and output head are one in the base; the adapter has changed them differently, so both are written"
            )
        name, rounded = str(merged.dtype).removeprefix("torch."), merged.rounded
        # Plain numbers, read before the model is freed.
        result = MergeResult(target, merged.tensors, merged.changed, merged.nbytes, name, None)
        del policy, merged
        gc.collect()  # models are full of cycles, and what follows needs the memory
        if check is None:
            display.note("not verified: the merged model wasn't compared with base and adapter")
        else:
            result = replace(result, differences=check.differences(folder, rounded))
        write_card(folder, source.cfg.base_model, source.given, result, card_facts(processor))
    return result


def _check_options(dtype: str | None, shard_size: str | int) -> None:
    if not (shard_size > 0 if isinstance(shard_size, int) else SIZE.fullmatch(shard_size) and re.search("[1-9]", shard_size)):
        raise UserError(f"--shard-size: must be a size such as 5GB or 500MB, got {shard_size!r}")
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype: must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _open(source: Source, base: str | None, display: Display) -> tuple[Any, Any, Policy]:
    """Load tokenizer, processor, and base with adapter.

    Raises:
        UserError: when one of them can't be loaded, the base isn't the one that the run began with, or memory is short.
    """
    cfg = source.cfg
    try:
        # What else the run's config names isn't read, and may be gone.
        fetch_models(cfg.model_copy(update={"reference_model": None, "lora_model_dir": None, "trl": None}))
        bring_weights(cfg, ("base_model",))
        needed, free = memory_needed(cfg, MOST_TOKENS), machine_memory().free
        _check_base(source, base, display)
        if needed > free:
            raise UserError(
                f"merging takes {needed / 2**30:.1f} GiB of memory (the whole model in float32), and {free / 2**30:.1f} GiB "
                "are free; merge on a machine that has more"
            )
        if cfg.load_in_4bit or cfg.load_in_8bit:
            display.note(
                "the run trained on quantized weights of the base; the adapter is merged into the weights as they are stored"
            )
        # The tokenizer of training has tokens and a chat template that the base's may lack.
        own = (source.adapter / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(source.adapter) if own else load_tokenizer(cfg)
        return tokenizer, _processor(source, tokenizer), Policy(cfg, source.adapter)
    except ValueError as error:
        is_lost = str(error).startswith("base_model:") and "--base" not in str(error)
        hint = "\n--base MODEL says where the base model is, if it isn't there any more" if is_lost else ""
        raise UserError(f"{error}{hint}") from error


def _processor(source: Source, tokenizer: Any) -> ProcessorMixin | None:
    """Return the processor saved with the adapter, else the base's, with the tokenizer; None where the model has none."""
    own = any((source.adapter / name).is_file() for name in PROCESSOR_FILES)
    if not own:
        return find_processor(source.cfg, tokenizer)
    try:
        processor = AutoProcessor.from_pretrained(source.adapter, trust_remote_code=source.cfg.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"the processor in {str(source.adapter)!r} can't be loaded: {error}") from error
    processor.tokenizer = tokenizer
    return processor


def _check_base(source: Source, base: str | None, display: Display) -> None:
    """Compare the base with the one that the run began with, by its fingerprint."""
    if source.base_fingerprint is None:
        return
    try:
        now = base_fingerprint(source.cfg)
    except UserError as error:  # an adapter that the run continued is part of it, and may be gone
        display.note(f"the base model isn't compared with the one that the run began with: {error}")
        return
    if now == source.base_fingerprint:
        return
    if base is None:
        raise UserError(
            f"base_model: {source.cfg.base_model!r} has changed: the run in {source.given!r} began with the weights "
            f"{source.base_fingerprint}, and now there are {now} in their place; put them back, or name with --base what to "
            "merge into"
        )
    display.note(f"--base: {base!r} isn't, file by file, what the run began with")


class _Check:
    """What base and adapter compute on some sequences, to compare the merged model with; each is computed twice both times."""

    def __init__(self, source: Source, tokenizer: Any, policy: Policy, display: Display) -> None:
        self._trust, self._display = source.cfg.trust_remote_code, display
        sequences, self._origin = source.samples(tokenizer, policy.own_tokens)
        self._total = 2 * len(sequences)
        self._expected = expected_logits(policy.model, sequences, self._begin("computing base and adapter"))

    def differences(self, folder: Path, rounded: dict[str, torch.dtype]) -> Differences:
        """Compare. Raises RunFailed when they differ by more than rounding explains."""
        found = compare(self._expected, folder, rounded, self._begin("verifying"), trust_remote_code=self._trust)
        if not found.is_explained:
            raise RunFailed(
                f"the merged model differs from base and adapter: log-probabilities by up to {found.logps.largest:.2g} nats "
                f"(rms {found.logps.rms:.2g}), where rounding explains {found.rounding.largest:.2g} (rms "
                f"{found.rounding.rms:.2g}); it was deleted (--no-verify keeps one as it is)"
            )
        if found.hides_adapter:
            self._display.note(
                f"rounding changes log-probabilities by {found.logps.rms:.2g} nats (rms), the adapter by "
                f"{found.adapter.rms:.2g}: much of what was learned is lost; --dtype float32 keeps it"
            )
        return found

    def _begin(self, stage: str) -> Callable[[], None]:
        self._display.stage(f"{stage} on {self._origin}", self._total)
        done = count(1)
        return lambda: self._display.progress({"rows_done": next(done), "rows_total": self._total, "unit": "sequences"})
