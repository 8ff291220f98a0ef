"""Labels that were swapped on purpose, found by a reference that was trained on the rest of the data."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import inspect
from pipeline.demo.preferences import preference_pairs
from pipeline.inspection.rules import suspected_flips
from pipeline.ray.tasks import run_here
from tests.pipeline.inspection.conftest import prepared_of, recipe_of, scored
from tests.tiny import tiny_model, tiny_tokenizer

FLIPPED = 0.05
STEPS, BATCH = 60, 16


def flipped_pairs(seed: int = 0) -> tuple[list[dict[str, Any]], set[int]]:
    """The demo's pairs, a twentieth of them with chosen and rejected swapped; and which."""
    rows = list(preference_pairs(held_out=False))
    wrong = set(random.Random(seed).sample(range(len(rows)), round(FLIPPED * len(rows))))
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    flipped = [{swapped.get(key, key): value for key, value in row.items()} for row in rows]
    return [flipped[index] if index in wrong else row for index, row in enumerate(rows)], wrong


def trained(rows: list[dict[str, Any]]) -> Any:
    """A tiny model after some steps on the chosen answers of rows."""
    model = tiny_model(tiny_tokenizer())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = [rows[index] for index in order.choice(len(rows), BATCH, replace=False)]
        sequences = [torch.tensor([*row["prompt_ids"], *row["chosen_ids"]]) for row in batch]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        labels = torch.full_like(ids, -100)
        for index, row in enumerate(batch):
            start, end = len(row["prompt_ids"]), len(row["prompt_ids"]) + len(row["chosen_ids"])
            labels[index, start:end] = ids[index, start:end]
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_flipped_labels_are_the_lowest_score_gaps(tiny_base: str, tmp_path: Path) -> None:
    rows, wrong = flipped_pairs()
    cfg = recipe_of(tiny_base, tmp_path, rows)
    prepared = prepared_of(cfg)
    scored(cfg, prepared, trained([row for row in prepared.read().to_pylist() if row["row_id"] not in wrong]))
    found = inspect(cfg, executor=run_here)
    lowest = found.table.nsmallest(round(FLIPPED * len(rows)), "score_gap")["row_id"]
    flagged = found.table[suspected_flips(found.table)]["row_id"]
    precision, recall = lowest.isin(wrong).mean(), len(wrong.intersection(flagged)) / len(wrong)
    print(f"{len(wrong)} of {len(rows)} flipped; lowest 5 %: precision {precision:.3f}")
    print(f"{len(flagged)} flagged: recall {recall:.3f}")
    assert precision >= 0.6
    finding = next(finding for finding in found.findings if finding.rule == "label_flips")
    assert finding.severity == "warning" and wrong.issuperset(map(int, finding.rows))
