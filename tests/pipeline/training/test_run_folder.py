"""What a run leaves, and when it may be continued."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from rich.console import Console

from cluster.placement import WorkerPlan
from pipeline.config import RunConfig, parse_config
from pipeline.errors import RunCancelled, RunFailed, RunStopped, UserError
from pipeline.runs import fork
from pipeline.runs.events import RunEvents
from pipeline.runs.folder import FORMER_RECORD, RunFolder
from pipeline.runs.fork import fork_from_checkpoint
from pipeline.runs.metrics import MetricsFile
from pipeline.runs.result import TrainResult
from pipeline.training.events import merge_ledgers
from pipeline.training.row_ledger import planned_steps
from strategies.batch.plan import BatchPlan
from strategies.checkpoints.manifest import write_manifest


def config(**keys: object) -> RunConfig:
    return parse_config({"base_model": "m", "datasets": [{"path": "a"}], **keys})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def stop_after(folder: RunFolder, *steps: int) -> None:
    """Leave what a run leaves that stopped after checkpoints at `steps`."""
    for step in steps:
        (folder.path / f"checkpoint-{step:06d}").mkdir()
        write_manifest(folder.path / f"checkpoint-{step:06d}", 0, 1, {})


def test_a_new_run_writes_its_config(folder: RunFolder) -> None:
    folder.open(config(rl_beta=0.3), resume=False)
    assert "rl_beta: 0.3" in folder.config.read_text()


def test_a_stopped_run_is_refused_without_resume(folder: RunFolder) -> None:
    folder.open(config(), resume=False)
    stop_after(folder, 5, 10)
    with pytest.raises(UserError, match="holds a run stopped after step 10; continue it with --resume"):
        folder.open(config(), resume=False)
    folder.open(config(num_epochs=3), resume=True)
    assert folder.checkpoints() == [5, 10]


def test_a_finished_run_is_refused_without_resume(folder: RunFolder) -> None:
    folder.open(config(), resume=False)
    folder.start("data", 12)
    folder.model.mkdir()
    folder.finish(12, None)
    with pytest.raises(UserError, match="holds a finished run of 12 steps"):
        folder.open(config(), resume=False)


def test_a_finished_run_without_checkpoints_stays_as_it_is(folder: RunFolder) -> None:
    folder.open(config(save_strategy="no"), resume=False)
    folder.start("data", 12)
    folder.metrics.write_text('{"step": 12}\n')
    folder.model.mkdir()
    folder.finish(12, None)
    folder.open(config(save_strategy="no", num_epochs=3), resume=True)
    assert (folder.finished_steps(), folder.metrics.read_text()) == (12, '{"step": 12}\n')
    with pytest.raises(UserError, match="finished with step 12 and left no checkpoint to continue from up to step 36"):
        folder.start("data", 36)


def test_a_run_is_not_continued_on_other_data(folder: RunFolder) -> None:
    folder.open(config(), resume=False)
    folder.start("old", 12)
    stop_after(folder, 5)
    with pytest.raises(UserError, match="the data have changed: .* prepared data old, and now they are new"):
        folder.start("new", 12)


def test_a_run_is_not_continued_from_another_base_model(folder: RunFolder) -> None:
    folder.open(config(), resume=False)
    folder.start("data", 12, base="old")
    stop_after(folder, 5)
    with pytest.raises(UserError, match="the base model has changed: .* from the weights old, and now there are new in their"):
        folder.start("data", 12, base="new")


def test_a_run_is_not_continued_beside_another_reference(folder: RunFolder) -> None:
    folder.open(config(), resume=False)
    folder.start("data", 12, scores="old")
    stop_after(folder, 5)
    folder.check("data", 12)  # not scored yet, or a live reference
    with pytest.raises(UserError, match="the reference has changed: .* beside the scores old, and now they are new"):
        folder.start("data", 12, scores="new")


def test_what_is_not_a_run_is_left_alone(folder: RunFolder) -> None:
    (folder.path / "checkpoint-500").mkdir(parents=True)
    (folder.path / "config.yaml").write_text("mine: true")
    with pytest.raises(UserError, match="is not empty \\(checkpoint-500, config.yaml\\) and holds no run"):
        folder.open(config(), resume=False)
    assert (folder.path / "config.yaml").read_text() == "mine: true"
    assert (folder.path / "checkpoint-500").is_dir()


def test_another_run_is_not_continued(folder: RunFolder) -> None:
    folder.open(config(rl_beta=0.1), resume=False)
    stop_after(folder, 5)
    with pytest.raises(UserError, match="other settings.*\n  rl_beta: was 0.1, is 0.2"):
        folder.open(config(rl_beta=0.2), resume=True)


def test_the_global_batch_stays_however_it_is_cut(folder: RunFolder) -> None:
    folder.open(config(micro_batch_size=4), resume=False)
    stop_after(folder, 5)
    folder.open(config(micro_batch_size=2, ray={"num_workers": 2}), resume=True)
    with pytest.raises(UserError, match="global batch: was 4, is 8"):
        folder.open(config(micro_batch_size=4, ray={"num_workers": 2}), resume=True)


def test_a_checkpoint_that_is_not_complete_does_not_count(folder: RunFolder) -> None:
    folder.open(config(), resume=False)
    (folder.path / "checkpoint-000005").mkdir()
    folder.metrics.write_text('{"step": 1}\n')
    assert folder.checkpoints() == []
    folder.open(config(rl_beta=0.2), resume=False)
    assert not (folder.path / "checkpoint-000005").exists()
    assert not folder.metrics.exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir: '.*/file/run' can't be written: Not a directory"):
        RunFolder(tmp_path / "file" / "run").open(config(), resume=False)


def test_what_a_run_without_a_checkpoint_has_left_is_cleared(folder: RunFolder) -> None:
    folder.open(config(), resume=False)
    (folder.path / "generations").mkdir()
    (folder.path / "report.html").write_text("of the run before")
    folder.open(config(), resume=False)
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "run.json"]


def test_a_page_alone_is_no_run(folder: RunFolder) -> None:
    folder.path.mkdir()
    (folder.path / "report.html").write_text("mine")
    with pytest.raises(UserError, match="is not empty \\(report.html\\) and holds no run"):
        folder.open(config(), resume=False)


def test_a_broken_run_json_is_said(folder: RunFolder) -> None:
    folder.open(config(), resume=False)
    (folder.path / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json is broken: Expecting"):
        folder.open(config(), resume=False)


def test_what_happens_is_kept_when_a_run_goes_on(folder: RunFolder) -> None:
    """An event that can't be written comes with the next one, and secrets stay out."""
    folder.open(config(), resume=False)
    folder.start("data", 12)
    events = RunEvents(folder)
    events.started(WorkerPlan(2, False, {"CPU": 1.0}), None)
    folder.path.rename(folder.path.with_name("away"))
    died = {"rank": 0, "node": None, "what": "died", "why": "s3://me:secret@bucket"}
    events.add("failure", step=3, workers=[died], restart=1)
    folder.path.with_name("away").rename(folder.path)
    stop_after(folder, 5)
    events.step = 6
    with pytest.raises(RunStopped), events:
        raise RunStopped("stopped by SIGTERM")
    folder.start("data", 24)
    state = folder.state() or {}
    assert [event["event"] for event in state["events"]] == ["began", "failure", "ended"]
    assert state["events"][1]["workers"][0]["why"] == "s3://***@bucket"
    assert {"step": 6, "how": "stopped", "why": "stopped by SIGTERM"}.items() <= state["events"][2].items()
    assert state["total_steps"] == 24


ENDS = {UserError: "failed", RunFailed: "failed", RunCancelled: "stopped", KeyboardInterrupt: "interrupted"}


@pytest.mark.parametrize("error", list(ENDS))
def test_how_a_run_ended(folder: RunFolder, error: type[BaseException]) -> None:
    folder.open(config(), resume=False)
    folder.start("data", 12)
    with pytest.raises(error), RunEvents(folder):
        raise error
    assert (folder.state() or {})["events"][-1]["how"] == ENDS[error]


def test_metrics_are_rewound_to_the_checkpoint(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append([{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}])
    metrics.append([{"step": 3, "loss": 0.5}])
    metrics.rewind(2)
    metrics.append([{"step": 3, "loss": 0.4}])
    assert [(record["step"], record["loss"]) for record in metrics.read()] == [(1, 0.7), (2, 0.6), (3, 0.4)]
    assert list(metrics.table()["loss"]) == [0.7, 0.6, 0.4]


def test_a_checkpoints_history_fills_what_a_lost_driver_has_not_written(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append([{"step": 1, "loss": 0.7, "time": 5.0}, {"step": 9, "loss": 0.1}])
    again = MetricsFile(metrics.path)
    again.rewind(2)
    again.append([{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}, {"step": 2, "eval_loss": 0.5}, {"step": 3, "loss": 0.4}])
    found = [(record["step"], record.get("loss"), record.get("eval_loss")) for record in again.read()]
    assert found == [(1, 0.7, None), (2, 0.6, None), (2, None, 0.5), (3, 0.4, None)]
    assert again.read()[0]["time"] == 5.0


def test_the_ledger_has_the_rows_of_all_ranks(tmp_path: Path) -> None:
    first = [{"step": 1, "row_ids": [4, 9]}, {"step": 2, "row_ids": [10], "skipped": True}]
    second = [{"step": 1, "row_ids": [7]}, {"step": 2, "row_ids": [], "skipped": True}]
    merged = merge_ledgers([first, second])
    assert merged == [{"step": 1, "row_ids": [4, 7, 9]}, {"step": 2, "row_ids": [10], "skipped": True}]
    ledger = MetricsFile(tmp_path / "ledger.jsonl")
    ledger.append(merged)
    ledger.rewind(1)
    ledger.append([{"step": 1, "row_ids": [0]}, {"step": 2, "row_ids": [10]}])
    assert ledger.read() == [merged[0], {"step": 2, "row_ids": [10]}]


def test_steps_that_were_not_written_follow_from_the_plan() -> None:
    records = planned_steps(BatchPlan(5, 2, seed=1), [10, 11, 12, 13, 14], range(1, 7), skipped=[2])
    assert [len(record["row_ids"]) for record in records] == [2, 2, 1, 2, 2, 1]
    assert sorted(row for record in records[3:] for row in record["row_ids"]) == [10, 11, 12, 13, 14]
    assert [record["step"] for record in records if record.get("skipped")] == [2]


def test_two_evaluation_sets_of_a_step_are_two_records(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    records = [{"step": 4, "epoch": 1.0, name: 0.5} for name in ("loss", "eval_easy_loss", "eval_hard_loss", "train_loss")]
    metrics.append(records)
    metrics.append(records)
    assert metrics.read() == records


def test_records_without_room_wait(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "folder" / "metrics.jsonl")
    metrics.append([{"step": 1}])
    with pytest.raises(FileNotFoundError):
        metrics.flush()
    (tmp_path / "folder").mkdir()
    metrics.append([{"step": 2}])
    assert metrics.read() == [{"step": 1}, {"step": 2}]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert MetricsFile(path).read() == [{"step": 1}]


def test_numbers_that_arent_finite_are_null_in_json_and_nan_on_the_terminal(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append([{"step": 1, "loss": float("nan"), "rewards/margins": float("inf")}])
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "rewards/margins": None}
    console = Console(file=io.StringIO(), width=100)
    console.print(TrainResult(tmp_path, 1))
    assert console.file.getvalue().count("nan") == 4


def test_a_run_that_stopped_early_has_finished(folder: RunFolder) -> None:
    folder.open(config(), resume=False)
    folder.start("data", 12)
    folder.model.mkdir()
    folder.finish(5, None, ended_early=True)
    assert folder.finished_steps() == folder.finished_steps(of=12) == 5
    assert folder.finished_steps(of=24) is None  # more than it was to have
    folder.finish(5, None)
    assert folder.finished_steps(of=12) is None


def test_what_a_run_without_its_model_has_left_is_kept(folder: RunFolder) -> None:
    folder.open(config(), resume=False)
    folder.start("data", 12)
    folder.finish(12, None)
    for resume in (False, True):
        with pytest.raises(
            UserError, match="what a run of 12 steps has left, and its model/ isn't there any more; put it back"
        ):
            folder.open(config(), resume)


@pytest.mark.parametrize("steps", [(), (5, 10)])
def test_rays_record_of_an_earlier_version_is_deleted(folder: RunFolder, steps: tuple[int, ...]) -> None:
    folder.open(config(), resume=False)
    stop_after(folder, *steps)
    folder.storage.write(FORMER_RECORD, "{}")
    folder.open(config(), resume=True)
    assert folder.storage.read(FORMER_RECORD) is None
    assert folder.checkpoints() == list(steps)


def test_a_folder_that_is_being_cleared_is_a_run_at_every_moment(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in between would leave other files without `run.json`, which are refused as another's."""
    folder.open(config(), resume=False)
    folder.metrics.write_text("{}")
    delete, seen = folder.storage.delete, []

    def watched(name: str) -> None:
        seen.append(folder.state())
        delete(name)

    monkeypatch.setattr(folder.storage, "delete", watched)
    folder.open(config(), resume=False)
    assert seen and all(state is not None and state["status"] == "opened" for state in seen)


def test_a_checkpoint_that_is_deleted_while_it_is_copied_is_no_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is copied."""
    origin, target = RunFolder(tmp_path / "origin"), RunFolder(tmp_path / "target")
    origin.storage.create()
    stop_after(origin, 4, 8)
    copy, copied = fs.copy_files, []

    def racing(source: str, *args: Any, **options: Any) -> None:
        if not copied:
            shutil.rmtree(source)
            Path(source).mkdir()
        copied.append(source)
        copy(source, *args, **options)

    monkeypatch.setattr(fork.fs, "copy_files", racing)
    assert fork_from_checkpoint(origin, 8, target, config()) == 4
    assert [Path(path).name for path in copied] == ["checkpoint-000008", "checkpoint-000004"]
