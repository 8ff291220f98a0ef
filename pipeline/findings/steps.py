"""Single steps, and their speed: rules of `rules.py`, which says when they find something."""

from __future__ import annotations

import numpy as np

from pipeline.findings.facts import RunFacts
from pipeline.ui.findings import Evidence, Finding, Severity

__all__ = ["data_waits", "gradient_spikes", "padding", "steps_skipped"]

BEFORE = 50
"""Most records before a gradient norm that it is compared with."""


def gradient_spikes(run: RunFacts) -> Finding | None:
    norms = run.curves["grad_norm"]
    if len(norms) <= 10:
        return None
    # The least value before each, first: medians of all records would take long.
    high = norms.values[1:] > np.maximum(10 * np.minimum.accumulate(norms.values)[:-1], run.cfg.max_grad_norm)
    candidates = [int(index) for index in np.flatnonzero(high) + 1 if index >= 10]
    usual = {index: float(np.median(norms.values[max(0, index - BEFORE) : index])) for index in candidates}
    found = [index for index in candidates if norms.values[index] > 10 * usual[index]]
    if not found:
        return None
    worst = max(found, key=lambda index: norms.values[index])
    step = int(norms.steps[worst])
    rows = tuple(run.rows_of([step]).get(step, ()))
    sentence = f"The gradient norm jumps at {len(found)} step{'s' * (len(found) > 1)}, most at step {step:,}."
    evidence = (norms.at(worst), Evidence("median before", usual[worst]))
    advice = "look at these rows, for answers that are empty, alike or garbled; longer warm-up, or a lower learning_rate"
    return Finding("gradient_spikes", "warning", sentence, evidence, advice, rows)


def steps_skipped(run: RunFacts) -> Finding | None:
    skipped = run.curves["skipped_steps"]
    if not len(skipped) or not skipped.last:
        return None
    steps, rows = run.curves.last_step, run.rows_of(None)
    severity: Severity = "error" if skipped.last >= steps / 10 else "warning"
    evidence = (
        Evidence("skipped steps", skipped.last),
        Evidence("of steps", steps),
        skipped.at(int(np.flatnonzero(skipped.values)[0])),
    )
    sentence = "Steps were skipped, since their loss or gradient wasn't finite."
    named = rows[min(rows)] if rows else ()
    advice = "look at these rows; lower learning_rate; with fp16, use bf16: true"
    return Finding("steps_skipped", severity, sentence, evidence, advice, tuple(named))


def padding(run: RunFacts) -> Finding | None:
    real, fed = run.curves["tokens_per_second"], run.curves["fed_tokens_per_second"]
    if run.setup.get("packed") or run.strategy.batch_kind != "pair" or not len(real) or not len(fed):
        return None
    part = 1 - float(np.median(real.values)) / float(np.median(fed.values))
    if part <= 0.2:
        return None
    severity: Severity = "warning" if part >= 0.5 else "info"
    evidence = (
        Evidence("% of computed tokens that is padding", round(100 * part, 1)),
        Evidence("micro_batch_size", run.cfg.micro_batch_size),
    )
    # Where packing was asked for, the run's notes say why it isn't done.
    advice = "micro_batch_size: 1 with gradient_accumulation_steps" if run.cfg.sample_packing else "sample_packing: true"
    return Finding("padding", severity, "Batches are padded, not packed.", evidence, advice)


def data_waits(run: RunFacts) -> Finding | None:
    data, step = run.curves["seconds/data"], run.curves["seconds/step"]
    # The first record pays for the start of the loader's processes.
    if len(data) < 3 or len(step) != len(data):
        return None
    waited, whole = float(data.values[1:].sum()), float(step.values[1:].sum())
    if whole <= 0 or waited <= 0.2 * whole:
        return None
    sentence = f"Training waits for its data: {waited / whole:.0%} of a step."
    evidence = (
        Evidence("seconds/data (mean)", float(data.values[1:].mean())),
        Evidence("seconds/step (mean)", whole / (len(step) - 1)),
    )
    return Finding("data_waits", "warning", sentence, evidence, "dataloader_num_workers: 2 or more")
