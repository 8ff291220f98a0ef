"""Answers on a run's page: those of the first and the last evaluation, and GRPO's completions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, inside, reason
from pipeline.report.page import Comparison, Message, Section
from pipeline.runs.folder import COMPLETIONS, GENERATIONS, RunFolder

__all__ = ["answer_sections"]

STEP = re.compile(r"(?:step-|completions_)(\d+)\.(?:jsonl|parquet)")
PROMPTS, EACH = 3, 4
"""Number of prompts shown of a file of completions, and of completions per prompt."""
BESIDE = ("step", "prompt", "completion", "advantage")
"""Columns of completions that aren't rewards."""


def answer_sections(folder: RunFolder, last_step: int) -> list[Section]:
    """Return sections for evaluation answers and GRPO completions, if the run has written any.

    Args:
        last_step: last step of the run; files of later steps are left over from another attempt.
    """
    return [*_generations(folder, last_step), *_completions(folder, last_step)]


def _generations(folder: RunFolder, last_step: int) -> Iterator[Section]:
    title, directory = "Answers before and after", Folder(inside(folder.path, GENERATIONS))
    try:
        files = _by_step(directory, last_step)
        if not files:
            return
        first, last = min(files), max(files)
        tables = {step: _rows(directory, files[step]) for step in (first, last)}
    except (*STORAGE_ERRORS, ValueError) as error:
        yield Section("answers", title, f"{GENERATIONS}/ can't be read: {reason(error)}")
        return
    words = f"Greedy answers to the first evaluation prompts, at the evaluations of step {first} and of step {last}."
    if first == last:
        words = f"Greedy answers to the first evaluation prompts. There was one evaluation, at step {last}."
    yield Section("answers", title, words, comparisons=list(_beside(tables, first, last)))


def _by_step(directory: Folder, last_step: int) -> dict[int, str]:
    files = {int(match[1]): name for name in directory.names() if (match := STEP.fullmatch(name))}
    return {step: name for step, name in files.items() if step <= last_step}


def _rows(directory: Folder, name: str) -> dict[str, dict[str, str]]:
    """Read a table of answers; return prompt -> row."""
    rows = [json.loads(line) for line in (directory.read(name) or "").splitlines()]
    if not all(isinstance(row, dict) and {"prompt", "policy"} <= row.keys() for row in rows):
        raise ValueError(f"{name} holds rows without prompt and policy")
    return {row["prompt"]: row for row in rows}


def _beside(tables: dict[int, dict[str, dict[str, str]]], first: int, last: int) -> Iterator[Comparison]:
    for prompt, row in tables[last].items():
        before = tables[first].get(prompt, {})
        answers = [Message("reference", row["reference"])] if "reference" in row else []
        if before.get("reference", row.get("reference")) != row.get("reference"):  # it follows the policy
            answers = [
                Message(f"reference, step {step}", answer_row["reference"])
                for step, answer_row in ((first, before), (last, row))
            ]
        if "policy" in before and first != last:
            answers.append(Message(f"policy, step {first}", before["policy"]))
        yield Comparison(Message("prompt", prompt), [*answers, Message(f"policy, step {last}", row["policy"])])


def _completions(folder: RunFolder, last_step: int) -> Iterator[Section]:
    title, directory = "Completions", Folder(inside(folder.path, COMPLETIONS))
    try:
        files = _by_step(directory, last_step)
        if not files:
            return
        # Without duplicates, where the first step is the last one.
        tables = {step: _table(directory, files[step]) for step in dict.fromkeys((min(files), max(files)))}
    except (*STORAGE_ERRORS, ValueError) as error:
        yield Section("completions", title, f"{COMPLETIONS}/ can't be read: {reason(error)}")
        return
    words = "What the policy generated, and how it was rewarded, in the first step that was logged and in the last one."
    comparisons = [comparison for step, rows in tables.items() for comparison in _groups(step, rows)]
    yield Section("completions", title, words, comparisons=comparisons)


def _table(directory: Folder, name: str) -> list[dict[str, Any]]:
    with directory.filesystem.open_input_file(f"{directory.path}/{name}") as file:
        table: pa.Table = pq.read_table(file)
    if missing := {"prompt", "completion"} - set(table.column_names):
        raise ValueError(f"{name} has no column {' or '.join(sorted(missing))}")
    return table.to_pylist()


def _groups(step: int, rows: Sequence[dict[str, Any]]) -> Iterator[Comparison]:
    """Yield the first `PROMPTS` prompts of a step, each with its first `EACH` completions."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        # By text: messages aren't hashable.
        groups.setdefault(_text(row["prompt"]), []).append(row)
    for prompt, group in list(groups.items())[:PROMPTS]:
        answers = [Message(_rewards(row), _text(row["completion"])) for row in group[:EACH]]
        yield Comparison(Message(f"prompt, step {step}", prompt), answers)


def _rewards(row: dict[str, Any]) -> str:
    """Format the rewards of a completion by function, and its advantage."""
    # TRL writes a column for each reward function, named after it.
    numbers = {name: value for name, value in row.items() if name not in BESIDE and isinstance(value, int | float)}
    if isinstance(row.get("advantage"), int | float):
        numbers["advantage"] = row["advantage"]
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()) or "completion"


def _text(value: Any) -> str:
    """Format a prompt or completion, which is text or messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value)
    return json.dumps(value, ensure_ascii=False, default=str)
