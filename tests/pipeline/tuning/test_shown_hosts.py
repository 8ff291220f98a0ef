"""Where trials were that share a base, as tables and as a page, without running any."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.config import parse_config
from pipeline.report.sweep import sweep_page
from pipeline.runs.owner import owned
from pipeline.training.host import HostStart
from pipeline.tuning.folder import SweepFolder
from pipeline.tuning.objective import Objective, SweepObjective
from pipeline.tuning.records import Stay, TrialRecord, dump, load, table_of
from pipeline.tuning.result import SweepResult
from pipeline.tuning.saved import open_sweep
from pipeline.tuning.shared_stages import SharedStages, SweepSavings, most_at_once, seconds_of
from pipeline.tuning.table import hosts_line, trials_table
from tests.browser import faint, needs_chromium, open_page, undrawn

METRIC = "eval_rewards/accuracies"
MEASURE = SweepObjective((Objective(METRIC, "max"),), {}, (METRIC,))
WHY = "lora_modules_to_save: trains the embeddings, which are the base's"
T = 1_790_000_000.0
SHARED = SharedStages(1, 1, 40, 1.0, 2.0, 8, True, copies=2, slots=4, base_bytes=10**8)


def records() -> list[TrialRecord]:
    """Two trials at once on host 0, of which one makes room for a third; one on host 1; one with workers of its own."""
    stays = [
        [Stay(0, T, T + 100)],
        [Stay(0, T, T + 40)],
        [Stay(0, T + 40, T + 90)],
        [Stay(1, T + 10, T + 20), Stay(1, T + 60, T + 110)],
        [Stay(None, T + 20, T + 70, WHY)],
    ]
    states = ("finished", "stopped", "finished", "finished", "failed")
    return [
        TrialRecord(
            number,
            {"learning_rate": 1e-4 * (number + 1)},
            states[number],  # type: ignore[arg-type]
            f"{number:03d}",
            4 if number == 1 else 8,
            8,
            {METRIC: 0.5 + number / 10},
            tokens=1000,
            seconds=50.0,
            speed=20.0,
            stays=where,
        )
        for number, where in enumerate(stays)
    ]


def running() -> list[TrialRecord]:
    found = records()
    for number in (0, 2, 3):
        found[number].status = "running"
        found[number].stays[-1].ended = None
    return found


def drawn(renderable: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_slots_that_trials_have() -> None:
    line = "3 of 4 slots on 2 copies of the base model taken (host 0: trials 0, 2; host 1: trial 3), 60 tokens/s in all"
    assert hosts_line(running(), 2, 2) == line
    assert hosts_line([], 1, 8) == "0 of 8 slots on one copy of the base model taken"
    text = drawn(trials_table(running(), ["learning_rate"], MEASURE, line))
    below = " ".join(text.rpartition("┘")[2].split())
    assert below.endswith(line) and f"workers of their own: trial 4 ({WHY})" in below
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in text.splitlines() if "│" in row]
    assert [row[5] for row in rows] == ["0", "0", "0", "1", "own"] and {row[6] for row in rows} == {"20"}


def test_times_of_stays() -> None:
    stays = [stay for record in records() for stay in record.stays]
    assert seconds_of(stays) == 110.0 and seconds_of([Stay(0, T, T + 5), Stay(0, T + 10, T + 11)]) == 6.0
    assert most_at_once(stays) == 4 and most_at_once([]) == 0
    # A slot that passes on is one slot.
    assert most_at_once([Stay(0, T, T + 5), Stay(0, T + 5, T + 9)]) == 1


def test_what_one_base_has_saved() -> None:
    shared = SHARED.with_starts([HostStart(0, 6.0, 1.0, 2 * 10**8), HostStart(1, 8.0, 2.0, 2 * 10**8)])
    assert shared == SharedStages(**json.loads(json.dumps(shared.summary()))) and SHARED.with_starts([]) is SHARED
    saved = SweepSavings.of(records(), shared)
    assert saved.speed == pytest.approx(5000 / 110)
    memory, time = [text for text in saved.sentences() if "more" in text][1:]
    assert memory == (
        "Up to 3 trials at once trained on 2 copies of the base model (0.20 GB); with one each they would have held "
        "0.20 GB more."
    )
    assert time == (
        "Workers were started 2 times for 5 runs in slots, in 7.0 s each, of which 1.5 s loaded the base; 3 more such starts "
        "would have taken 21 s of workers' time, an estimate by these starts."
    )
    # Until a host has ended, nothing was measured.
    assert not any("started" in text for text in SweepSavings.of(records(), SHARED).sentences())


def test_a_stay_ends_with_the_trial() -> None:
    record = TrialRecord(0, None)
    record.begin()
    record.enter(1)
    assert record.shown_host == "1"
    (saved,) = json.loads(dump([record]))
    assert saved["seconds"] >= 0 and saved["stays"][0]["ended"] >= saved["stays"][0]["began"]
    record.enter(None, "it ran out of memory beside other trials")
    assert (record.shown_host, len(record.stays)) == ("own", 2) and record.stays[0].ended is not None
    record.end("stopped")
    assert load(json.loads(dump([record]))) == [record]


def test_the_table_says_who_shared() -> None:
    table = table_of(records(), ["learning_rate"])
    assert table["host"].tolist()[:4] == [0, 0, 0, 1] and table["host"].isna().tolist()[4]
    assert table["own_workers_because"].fillna("").tolist() == ["", "", "", "", WHY]
    alone = [replace(record, stays=[]) for record in records()]
    assert not {"host", "own_workers_because"} & set(table_of(alone, ["learning_rate"]).columns)


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    keys = {"base_model": "m", "datasets": [{"path": "a.jsonl"}], "val_set_size": 8, "output_dir": str(tmp_path)}
    tune = {"space": {"learning_rate": {"loguniform": [1e-6, 1e-4]}}, "num_samples": 5}
    folder = SweepFolder(tmp_path / "sweep")
    folder.open(parse_config({**keys, "tune": tune}), resume=False)
    folder.write_state({"status": "started", "shared": SHARED.summary()})
    folder.write_records(running())
    for number in range(5):
        (tmp_path / "sweep" / "trials" / f"{number:03d}").mkdir(parents=True)
        rows = [{"step": step, METRIC: 0.5 + number / 10} for step in (2, 4)]
        (tmp_path / "sweep" / "trials" / f"{number:03d}" / "metrics.jsonl").write_text(
            "".join(f"{json.dumps(row)}\n" for row in rows)
        )
    return folder


def test_other_processes_see_the_slots(sweep: SweepFolder) -> None:
    with owned(sweep.storage):
        text = drawn(open_sweep(str(sweep.path)))
        assert "3 of 4 slots" in text and text.count("running") == 3 and "best.yaml" not in text
    # Its driver was killed: nothing runs.
    text = drawn(open_sweep(str(sweep.path)))
    assert "slots" not in text and text.count("waiting") == 3


@needs_chromium
def test_the_page_shows_the_slots(sweep: SweepFolder, tmp_path: Path) -> None:
    result = SweepResult(sweep.path, open_sweep(str(sweep.path)).result.cfg, MEASURE, records())
    file = tmp_path / "page.html"
    file.write_text(sweep_page(result, sweep, SHARED.with_starts([HostStart(0, 6.0, 1.0, 2 * 10**8)])))
    with open_page(file, 420, "dark") as (page, said):
        assert page.locator("#hosts .bars path").count() == 6
        rows = [row.inner_text().split("\t") for row in page.locator("#hosts tbody tr").all()]
        assert rows == [
            ["host 0", "0, 1, 2", "2", "0:01:40", "95%"],
            ["host 1", "3", "1", "0:01:00", "50%"],
            ["own workers", "4", "1", "0:00:50", ""],
        ]
        labels = page.locator("#hosts .ytick text").all_text_contents()
        assert set(labels) == {"host 0, slot 0", "host 0, slot 1", "host 1, slot 0", "own workers 0"}
        assert WHY in page.locator("#hosts p").inner_text() and WHY in page.locator("#trials").inner_text()
        assert undrawn(page) == faint(page) == said == []
