"""Results are drawn by any console: their values as they are, whole, whatever its width and its markup."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
from ray.job_submission import JobDetails, JobStatus, JobType
from rich.console import Console, RenderableType

from pipeline.config import parse_config
from pipeline.data import Preview
from pipeline.data.store import COUNTS, Prepared
from pipeline.demo.report import Comparison
from pipeline.doctor.checks import Check
from pipeline.doctor.result import Examination
from pipeline.evaluation.generate import Answers
from pipeline.evaluation.result import Evaluation
from pipeline.evaluation.statistics import Estimate
from pipeline.inspection.result import Inspection
from pipeline.io.storage import Folder
from pipeline.jobs.job import Job
from pipeline.jobs.tables import job_lines, jobs_table
from pipeline.merging.result import MergeResult
from pipeline.reference.score_store import Scores
from pipeline.runs.result import TrainResult
from pipeline.tuning.objective import resolve_objective
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.result import SweepResult
from pipeline.tuning.saved import Sweep
from pipeline.tuning.space import check_trials, corners
from pipeline.ui.console import Printable, html_of, open_console

ODD = "/data/[b]x[/b]/:smile:/[/]" + "-long" * 20
"""What other consoles take for markup and emoji, on a line that is longer than most are wide."""


def prepared() -> Prepared:
    source = {"path": ODD, **dict.fromkeys(COUNTS, 12345)}
    return Prepared(
        Path("p"),
        "f",
        1,
        0,
        0,
        {"kind": "prompt", "sources": [source], "lengths": {"prompt": {"max": 7}}, "files": []},
        Folder(Path("p")),
    )


def sweep() -> SweepResult:
    tune = {"space": {"warmup_ratio": {"choice": [0.0, 0.1]}}}
    cfg = parse_config({"base_model": "m", "datasets": [{"path": "d.jsonl"}], "val_set_size": 4, "tune": tune})
    assert cfg.tune is not None
    measure = resolve_objective(cfg.tune, check_trials(cfg, corners(cfg.tune)))
    return SweepResult("run", cfg, measure, [TrialRecord(1, {"warmup_ratio": ODD}, "failed", reason="it")])


def opened() -> Sweep:
    """The same trials, of a sweep that runs."""
    shown = Sweep.__new__(Sweep)
    folder = SimpleNamespace(records=lambda as_they_run: sweep().records, state=dict, storage=Folder(Path("nowhere")))
    vars(shown).update(_first_read=sweep(), folder=folder)
    return shown


def run() -> TrainResult:
    result = TrainResult(ODD, 24)
    result.__dict__["history"] = pandas.DataFrame({"loss": [0.7, 0.5]})
    return result


def answers() -> Answers:
    return Answers("run", "base", ({"prompt": "a?", "policy": "b", "reference": ODD},))


def job() -> JobDetails:
    return JobDetails(type=JobType.SUBMISSION, submission_id="job-1", status=JobStatus.RUNNING, entrypoint=ODD)


RESULTS: dict[type[Printable], Callable[[], RenderableType]] = {
    Answers: answers,
    Comparison: lambda: Comparison(answers(), 1, 3.0),
    Evaluation: lambda: Evaluation("m", None, {"m": Estimate(0.5, 0.4, 0.6, 9)}, {ODD: {}}, 0.95),
    Examination: lambda: Examination((Check("storage", "warn", ODD),), None),
    Inspection: lambda: Inspection(prepared(), None, (), (ODD,), (), pandas.DataFrame({"chosen_length": [3, 4]})),
    Job: lambda: job_lines(job()),
    MergeResult: lambda: MergeResult(ODD, 9, 2, 3 * 10**9, "bfloat16", None),
    Prepared: prepared,
    Preview: lambda: Preview(prepared(), object(), examples=0),  # type: ignore[arg-type]  # no row is decoded
    Scores: lambda: Scores(Path(ODD), "f", 52, 8, {}, Folder(Path(ODD))),
    Sweep: opened,
    SweepResult: sweep,
    TrainResult: run,
}
NAMES = [one.__name__ for one in RESULTS]


def printed(result: RenderableType, width: int, make_console: Callable[..., Console] = Console) -> str:
    file = io.StringIO()
    make_console(file=file, width=width).print(result)
    return file.getvalue()


def test_every_result_is_here() -> None:
    assert set(Printable.__subclasses__()) == RESULTS.keys()


@pytest.mark.parametrize("make", RESULTS.values(), ids=NAMES)
def test_values_are_shown_whole_and_without_markup(make: Callable[[], RenderableType]) -> None:
    """Also by `rich.print`, whose console interprets markup, and crops what is wider than it is."""
    wide, narrow = (printed(make(), width) for width in (1000, 60))
    assert ODD in wide and max(map(len, narrow.splitlines())) <= 60
    letters, folded = (Counter(filter(str.isalnum, text)) for text in (wide, narrow))
    assert folded == letters


def test_a_terminal_wraps_lines_and_rich_wraps_tables() -> None:
    """A path can be copied from any terminal, and the frame of a table holds."""
    for result, line in ((run(), f"model   {ODD}/model"), (RESULTS[Scores](), f"scores    {ODD}")):
        assert line in printed(result, 60, open_console).splitlines()
    table = printed(jobs_table([job()], f"http://[b].{'a-long-' * 20}host"), 60, open_console)
    assert "http://[b].a-long" in table and max(map(len, table.splitlines())) <= 60


def test_a_file_gets_wide_tables_and_no_colours() -> None:
    file = io.StringIO()
    console = open_console(least=140, file=file, width=80)
    console.print(RESULTS[Examination]())
    assert "\x1b" not in file.getvalue() and 80 < max(map(len, file.getvalue().splitlines())) <= 140
    assert open_console(least=140, file=io.StringIO(), width=80, force_terminal=True).width == 80


@pytest.mark.parametrize("make", RESULTS.values(), ids=NAMES)
def test_notebooks_show_the_same(make: Callable[[], Any]) -> None:
    result = make()
    if isinstance(result, Printable):
        assert "[b]x[/b]/:smile:" in result._repr_html_() == html_of(result)


def test_results_are_still_values() -> None:
    result = MergeResult("m", 9, 2, 3, "bfloat16", None)
    assert pickle.loads(pickle.dumps(result)) == result != MergeResult("n", 9, 2, 3, "bfloat16", None)
