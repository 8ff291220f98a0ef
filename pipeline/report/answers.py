"""Answers on a run's page: at the first evaluation beside the last one, and what GRPO generated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.patience import STORAGE_ERRORS
from pipeline.report.page import Said, Sample, Section
from pipeline.storage import Folder, inside, reason
from pipeline.training.folder import COMPLETIONS, GENERATIONS, RunFolder

__all__ = ["answer_sections"]

STEP = re.compile(r"(?:step-|completions_)(\d+)\.(?:jsonl|parquet)")
PROMPTS, EACH = 3, 4
"""How many prompts are shown of a file of completions, and how many completions of each."""
BESIDE = ("step", "prompt", "completion", "advantage")
"""Columns of completions that are no reward."""


def answer_sections(folder: RunFolder, last_step: int) -> list[Section]:
    """The answers of evaluations and the completions of GRPO, where the run has written any.

    Args:
        last_step: of the run; what is of later steps is another attempt's.
    """
    return [*_generations(folder, last_step), *_completions(folder, last_step)]


def _generations(folder: RunFolder, last_step: int) -> Iterator[Section]:
    title, where = "Answers before and after", Folder(inside(folder.path, GENERATIONS))
    try:
        files = _by_step(where, last_step)
        if not files:
            return
        first, last = min(files), max(files)
        tables = {step: _rows(where, files[step]) for step in (first, last)}
    except (*STORAGE_ERRORS, ValueError) as error:
        yield Section("answers", title, f"{GENERATIONS}/ can't be read: {reason(error)}")
        return
    words = f"Greedy answers to the first evaluation prompts, at the evaluations of step {first} and of step {last}."
    if first == last:
        words = f"Greedy answers to the first evaluation prompts. There was one evaluation, at step {last}."
    yield Section("answers", title, words, samples=list(_beside(tables, first, last)))


def _by_step(where: Folder, last_step: int) -> dict[int, str]:
    found = {int(match[1]): name for name in where.names() if (match := STEP.fullmatch(name))}
    return {step: name for step, name in found.items() if step <= last_step}


def _rows(where: Folder, name: str) -> dict[str, dict[str, str]]:
    """Rows of a table of answers, by their prompts."""
    rows = [json.loads(line) for line in (where.read(name) or "").splitlines()]
    if not all(isinstance(row, dict) and {"prompt", "policy"} <= row.keys() for row in rows):
        raise ValueError(f"{name} holds rows without prompt and policy")
    return {row["prompt"]: row for row in rows}


def _beside(tables: dict[int, dict[str, dict[str, str]]], first: int, last: int) -> Iterator[Sample]:
    for prompt, row in tables[last].items():
        before = tables[first].get(prompt, {})
        answers = [Said("reference", row["reference"])] if "reference" in row else []
        if before.get("reference", row.get("reference")) != row.get("reference"):  # it follows the policy
            answers = [Said(f"reference, step {step}", one["reference"]) for step, one in ((first, before), (last, row))]
        if "policy" in before and first != last:
            answers.append(Said(f"policy, step {first}", before["policy"]))
        yield Sample(Said("prompt", prompt), [*answers, Said(f"policy, step {last}", row["policy"])])


def _completions(folder: RunFolder, last_step: int) -> Iterator[Section]:
    title, where = "Completions", Folder(inside(folder.path, COMPLETIONS))
    try:
        files = _by_step(where, last_step)
        if not files:
            return
        tables = {step: _table(where, files[step]) for step in dict.fromkeys((min(files), max(files)))}
    except (*STORAGE_ERRORS, ValueError) as error:
        yield Section("completions", title, f"{COMPLETIONS}/ can't be read: {reason(error)}")
        return
    words = "What the policy generated, and how it was rewarded, in the first step that was logged and in the last one."
    samples = [sample for step, rows in tables.items() for sample in _groups(step, rows)]
    yield Section("completions", title, words, samples=samples)


def _table(where: Folder, name: str) -> list[dict[str, Any]]:
    with where.filesystem.open_input_file(f"{where.path}/{name}") as file:
        table: pa.Table = pq.read_table(file)
    if missing := {"prompt", "completion"} - set(table.column_names):
        raise ValueError(f"{name} has no column {' or '.join(sorted(missing))}")
    return table.to_pylist()


def _groups(step: int, rows: Sequence[dict[str, Any]]) -> Iterator[Sample]:
    """The first prompts of a step, each with its first completions."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_text(row["prompt"]), []).append(row)
    for prompt, group in list(groups.items())[:PROMPTS]:
        answers = [Said(_rewards(row), _text(row["completion"])) for row in group[:EACH]]
        yield Sample(Said(f"prompt, step {step}", prompt), answers)


def _rewards(row: dict[str, Any]) -> str:
    """The number that each reward function gave, and the advantage that followed."""
    numbers = {name: value for name, value in row.items() if name not in BESIDE and isinstance(value, int | float)}
    if isinstance(row.get("advantage"), int | float):
        numbers["advantage"] = row["advantage"]
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()) or "completion"


def _text(value: Any) -> str:
    """A prompt or completion, which is text or messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value)
    return json.dumps(value, ensure_ascii=False, default=str)
