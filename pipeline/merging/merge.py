"""Merging as a whole: find the adapter, write the model, compare it with base and adapter, put it in place."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pipeline.display import Display
from pipeline.doctor.machine import machine_memory
from pipeline.errors import RunFailed, UserError
from pipeline.merging.files import write_card, write_configs
from pipeline.merging.output import Output
from pipeline.merging.samples import samples
from pipeline.merging.source import Source, open_source
from pipeline.notebook import default_display
from pipeline.reference import base_fingerprint
from pipeline.storage import Location, locate
from strategies.merging.adapter import EmptyPolicy
from strategies.merging.plan import MergePlan
from strategies.merging.verification import Differences, compare, expected_logits, memory_needed
from strategies.merging.weights import Weights, open_weights
from strategies.merging.writing import write_shards
from strategies.models import load_config
from strategies.tokenizer import load_tokenizer

__all__ = ["DTYPES", "MergeResult", "merge"]

DTYPES = ("float32", "bfloat16", "float16")
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB)", re.IGNORECASE)
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class MergeResult:
    """A merged model."""

    path: Location
    """Its folder: a Path, or the text of a URI."""
    tensors: int
    """Tensors of the model."""
    merged: int
    """Those of them that the adapter has changed."""
    nbytes: int
    """Size of all tensors in bytes."""
    dtype: str
    """Of the tensors, or of most of them."""
    differences: Differences | None
    """What lies between it and base + adapter; None when that wasn't looked at."""


def merge(
    run_or_adapter: str | Path,
    output: str | Path | None = None,
    *,
    base: str | None = None,
    dtype: str | None = None,
    shard_size: str | int = "5GB",
    verify: bool = True,
    display: Display | None = None,
) -> MergeResult:
    """Merge an adapter into its base model, tensor by tensor, and compare the result with base and adapter.

    Args:
        run_or_adapter: `output_dir` of a finished run, or a folder with an adapter.
        output: folder or URI of the merged model; `merged` in a run's folder, `ADAPTER-merged` beside an adapter's, when None.
        base: place of the base model, where it isn't the one that the run or the adapter names.
        dtype: one of `DTYPES`, of all weights; that of each of the base's when None.
        shard_size: size of a file at most, such as "5GB", or in bytes.
        verify: compare logits, which takes memory for one whole model in float32.
        display: shows stages, progress and notes; when None, progress is shown in a notebook and nothing elsewhere.

    Raises:
        UserError, ValueError: for what can't be merged, before anything is written.
        RunFailed: when the merged model differs from base and adapter by more than rounding explains, or can't be written;
            nothing is left of it then.
    """
    display = display or default_display()
    size, wanted = _size(shard_size), _dtype(dtype)
    with open_source(str(run_or_adapter), base) as source:
        place = output or source.output
        if place is None:
            raise UserError(f"--output: must be given for an adapter at a URI, such as {source.given!r}")
        target = Output(locate(str(place)))
        display.stage("reading the base model and the adapter")
        tokenizer, weights, policy = _open(source, base, display)
        plan = MergePlan(weights, policy, wanted)
        check = _Check(source, tokenizer, policy, display) if verify else None
        with target.staging(plan.nbytes) as (folder, put):
            _write(folder, plan, size, display)
            write_configs(folder, plan.config(), tokenizer, source.cfg)
            rounded, grown_to = plan.rounded, policy.grown_to
            main = str(plan.main_dtype).removeprefix("torch.")
            result = MergeResult(target.where, len(plan.outputs), len(plan.merged), plan.nbytes, main, None)
            del weights, policy, plan  # what follows needs the memory
            if check is None:
                display.note("not verified: the merged model wasn't compared with base and adapter")
            else:
                result = replace(result, differences=check.differences(folder, grown_to, rounded))
            write_card(folder, source, result)
            put()
    return result


def _open(source: Source, base: str | None, display: Display) -> tuple[Any, Weights, EmptyPolicy]:
    """Tokenizer, base and adapter.

    Raises:
        ValueError: when one of them can't be loaded, or the base isn't the one that the run began with.
    """
    cfg = source.cfg
    try:
        config = load_config(cfg)
        _check_base(source, base, display)
        weights = open_weights(cfg)
    except ValueError as error:
        hint = "" if "--base" in str(error) else "\n--base MODEL says where the base model is, if it isn't there any more"
        raise UserError(f"{error}{hint}") from error
    if cfg.load_in_4bit or cfg.load_in_8bit:
        display.note(
            "the run trained on quantized weights of the base; the adapter is merged into the weights as they are stored"
        )
    if weights.whole is not None:
        display.note(f"the base model is loaded whole: {weights.whole}")
    own = (source.adapter / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(source.adapter) if own else load_tokenizer(cfg)
    return tokenizer, weights, EmptyPolicy(config, source.adapter, trust_remote_code=cfg.trust_remote_code)


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


def _write(folder: Path, plan: MergePlan, size: int, display: Display) -> None:
    """Write the weights."""

    def progress(done: int, of: int) -> None:
        display.progress({"rows_done": done, "rows_total": of, "unit": "tensors"})

    display.stage("merging", len(plan.outputs))
    write_shards(plan, folder, size, progress)
    if plan.is_untied:
        display.note(
            "embedding and output head are one in the base; the adapter has changed them differently, so both are written"
        )


class _Check:
    """The comparison with base and adapter, of which is known before anything is written whether there is memory for it.

    Raises:
        UserError: when there isn't.
    """

    def __init__(self, source: Source, tokenizer: Any, policy: EmptyPolicy, display: Display) -> None:
        self._source, self._display = source, display
        self._sequences, self._origin = samples(source.prepared, tokenizer, policy.own_tokens())
        needed = memory_needed(policy.parameters, self._sequences, policy.vocabulary)
        if needed > (free := machine_memory().free):
            raise UserError(
                f"comparing the merged model with base and adapter takes {needed / 2**30:.1f} GiB of memory, and "
                f"{free / 2**30:.1f} GiB are free; --no-verify merges without it"
            )

    def differences(self, folder: Path, grown_to: int | None, rounded: dict[str, torch.dtype]) -> Differences:
        """Compare.

        Raises:
            RunFailed: when they differ by more than rounding explains.
        """
        cfg = self._source.cfg
        steps = iter(range(1, 3 * len(self._sequences) + 1))

        def advance() -> None:
            done = {"rows_done": next(steps), "rows_total": 3 * len(self._sequences), "unit": "sequences"}
            self._display.progress(done)

        self._display.stage(f"verifying on {self._origin}", 3 * len(self._sequences))
        expected = expected_logits(cfg, self._source.adapter, grown_to, self._sequences, advance)
        found = compare(expected, folder, rounded, advance, trust_remote_code=cfg.trust_remote_code)
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


def _size(given: str | int) -> int:
    match = SIZE.fullmatch(str(given).strip())
    size = float(match[1]) * UNITS[match[2].upper()] if match else given if isinstance(given, int) else 0
    if size < 1:
        raise UserError(f"--shard-size: must be a size such as 5GB or 500MB, got {given!r}")
    return int(size)


def _dtype(given: str | None) -> torch.dtype | None:
    if given is None:
        return None
    if given not in DTYPES:
        raise UserError(f"--dtype: must be one of {', '.join(DTYPES)}, got {given!r}")
    return getattr(torch, given)
