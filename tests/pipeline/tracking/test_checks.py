"""What is said of trackers before anything starts, and of those that fail later."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.config import parse_config
from pipeline.errors import ConfigError, RunFailed, RunStopped, UserError
from pipeline.io.storage import Folder
from pipeline.runs.resume import changed_settings
from pipeline.tracking import dispatcher
from pipeline.tracking.dispatcher import TRACKERS, TrackerThread, Tracking, check_trackers, tracker_variables
from pipeline.tracking.tracker import TrialInfo, flatten, name_of
from pipeline.tuning.folder import earlier_tracker_runs
from pipeline.ui.display import SilentDisplay
from strategies.config.trackers import used_trackers, without_trackers
from tests.ports import unused_port
from tests.trackers import offline_runs


def config(**keys: Any) -> Any:
    return parse_config({"base_model": "tiny", "rl": "dpo", "datasets": [{"path": "pairs.jsonl"}], **keys})


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home without keys."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({}, []),
        ({"use_tensorboard": True}, ["tensorboard"]),
        ({"wandb_project": "p"}, ["wandb"]),
        ({"mlflow_experiment_name": "e"}, ["mlflow"]),
        ({"trackio_project_name": "p"}, ["trackio"]),
        ({"use_wandb": True, "use_mlflow": True, "use_trackio": False}, ["wandb", "mlflow"]),
    ],
)
def test_a_project_or_an_experiment_asks_for_its_tracker(keys: dict[str, Any], names: list[str]) -> None:
    assert used_trackers(config(**keys)) == names
    assert used_trackers(without_trackers(config(**keys))) == []


def test_each_tracker_has_a_file_and_a_key() -> None:
    folder = Path(dispatcher.__file__).parent
    assert {file.stem for file in folder.glob("*.py")} == {"__init__", "dispatcher", "tracker", *TRACKERS}
    assert [name for name in TRACKERS if TRACKERS[name].__module__ != f"pipeline.tracking.{name}"] == []
    used = used_trackers(config(**{f"use_{name}": True for name in TRACKERS}))
    assert used == [*TRACKERS]


def test_trackers_are_imported_without_their_packages() -> None:
    packages = {tracker.package for tracker in TRACKERS.values()}
    code = f"import sys, pipeline.tracking.dispatcher; print(sorted({packages!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"wandb_name": "n"}, "wandb_name: has no effect without use_wandb: true"),
        ({"wandb_project": "p", "use_wandb": False}, "wandb_project: has no effect without use_wandb: true"),
        ({"mlflow_tracking_uri": "http://a"}, "mlflow_tracking_uri: has no effect without use_mlflow: true"),
        ({"wandb_project": "p", "wandb_watch": "gradients"}, "wandb_watch: gradients and weights stay with the workers"),
        ({"wandb_project": "p", "wandb_log_model": "always"}, "wandb_log_model: .*'end'"),
        (
            {"use_mlflow": True, "hf_mlflow_log_artifacts": True, "output_dir": "s3://bucket/run"},
            "hf_mlflow_log_artifacts: checkpoints are in storage already, at 's3://bucket/run'",
        ),
    ],
)
def test_keys_that_do_nothing_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**keys)


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.dispatcher.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"use_mlflow: mlflow is not installed; pip install 'prefray\[trackers\]'"):
        check_trackers(config(use_mlflow=True))


def test_an_mlflow_server_that_is_not_there() -> None:
    began = time.monotonic()
    where = f"http://127.0.0.1:{unused_port()}"
    with pytest.raises(UserError, match=f"use_mlflow: MLflow can't be reached at '{where}': .*Connection refused"):
        check_trackers(config(use_mlflow=True, mlflow_tracking_uri=where))
    assert time.monotonic() - began < 200


@pytest.fixture
def mute() -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as one:
        yield f"http://127.0.0.1:{one.getsockname()[1]}"


def test_an_mlflow_server_that_does_not_answer(mute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with pytest.raises(UserError, match="use_mlflow: MLflow can't be reached at .*[Tt]imed? ?out"):
        check_trackers(config(use_mlflow=True, mlflow_tracking_uri=mute))


def test_a_job_wants_a_place_for_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.mlflow.is_in_job_package", lambda: True)
    with pytest.raises(UserError, match="mlflow_tracking_uri: a job's own folder is deleted after it"):
        check_trackers(config(use_mlflow=True))


def test_wandb_without_a_key_asks_nobody() -> None:
    with pytest.raises(UserError, match="use_wandb: W&B has no API key here; set WANDB_API_KEY"):
        check_trackers(config(use_wandb=True))
    check_trackers(config(use_wandb=True, wandb_mode="offline"))


def test_wandb_with_something_that_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match="use_wandb: .*WANDB_API_KEY invalid"):
        check_trackers(config(use_wandb=True))


def test_a_space_wants_a_token() -> None:
    with pytest.raises(UserError, match="trackio_space_id: a Space needs a token of Hugging Face"):
        check_trackers(config(use_trackio=True, trackio_space_id="me/space"))


def test_variables_of_trackers_go_along_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("UNRELATED_SECRET", "s")
    assert tracker_variables(config()) == {}
    found = tracker_variables(config(use_wandb=True))
    assert found["WANDB_API_KEY"] == "k" * 40 and "UNRELATED_SECRET" not in found


def test_a_resumed_run_may_have_other_trackers() -> None:
    assert changed_settings(config(), config(wandb_project="p", use_tensorboard=True)) == []


class Broken:
    """A tracker whose service goes away for a while."""

    label, link = "Broken", None

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.taken: list[Any] = []

    def log(self, records: list[dict[str, Any]]) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("https://me:secret@host is away")
        self.taken += records

    def end(self) -> None:
        self.taken.append("end")


@pytest.mark.parametrize(("failures", "taken", "words"), [(2, [1, 2, "end"], []), (3, [2, "end"], ["hasn't taken 1 of"])])
def test_a_tracker_that_fails_is_tried_again(
    failures: int, taken: list[Any], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "PAUSE_S", 0.01)
    tracker: Any = Broken(failures)
    notes: list[str] = []
    thread = TrackerThread(tracker, notes.append)
    for number in (1, 2):
        thread.submit(lambda number=number: tracker.log([number]))
    thread.close(tracker.end, within_s=60)
    first, *others = notes
    assert tracker.taken == taken
    assert first == "Broken has failed, training goes on: RuntimeError: https://***@host is away"
    assert len(others) == len(words) and all(word in note for word, note in zip(words, others, strict=True))


def test_a_tracker_that_hangs_is_left() -> None:
    tracker: Any = Broken(0)
    notes: list[str] = []
    thread, over = TrackerThread(tracker, notes.append), threading.Event()
    thread.submit(lambda: over.wait() and None)
    thread.close(tracker.end, within_s=0.1)
    assert notes == ["Broken hasn't taken everything within 0 s; the rest is left out"]
    over.set()


def test_names() -> None:
    assert flatten({"a": {"b": 1}, "c": [{"d": 2}, {"e": 3}], "f": [1, 2]}) == {"a.b": 1, "c.0.d": 2, "c.1.e": 3, "f": [1, 2]}
    assert name_of("s3://bucket/my-run?region=x") == name_of(Path("/runs/my-run")) == "my-run"


class Notes(SilentDisplay):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def away(tmp_path: Path) -> Any:
    """A recipe whose MLflow server has gone since it was checked."""
    server = f"http://127.0.0.1:{unused_port()}"
    (tmp_path / "run").mkdir()
    return config(use_mlflow=True, mlflow_tracking_uri=server, output_dir=str(tmp_path / "run"))


def test_a_run_that_a_tracker_does_not_begin(away: Any) -> None:
    folder = Folder(Path(away.output_dir))
    with (
        pytest.raises(UserError, match="use_mlflow: MLflow can't begin the run: .*Connection refused"),
        Tracking(away, folder, resume=False).running(Notes()),
    ):
        raise AssertionError("has begun")
    display = Notes()
    with Tracking(away, folder, resume=True, trial=TrialInfo("sweep", "003", {})).running(display):
        assert display.notes == []  # trials say what is wrong when their display listens
    assert "MLflow can't begin the run: " in display.notes[0]


def test_a_sweep_that_mlflow_does_not_begin(away: Any) -> None:
    with (
        pytest.raises(UserError, match="use_mlflow: MLflow can't begin the sweep's run: .*Connection refused"),
        Tracking(away, Folder(Path(away.output_dir)), resume=False, is_sweep=True).running(Notes()),
    ):
        raise AssertionError("has begun")


@pytest.mark.processes
def test_a_sweep_is_one_run_of_mlflow_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the trackers, a sweep is a run in those alone that nest its trials."""
    monkeypatch.chdir(tmp_path)  # where MLflow puts files without a server
    folder, store = Folder(tmp_path), f"sqlite:///{tmp_path}/mlflow.db"
    cfg = config(use_mlflow=True, mlflow_tracking_uri=store, use_tensorboard=True, output_dir=str(tmp_path))
    first, display = Tracking(cfg, folder, resume=False, is_sweep=True), Notes()
    with suppress(RunStopped), first.running(display):
        raise RunStopped("SIGTERM")
    assert [*first.ids] == ["mlflow"] and display.notes == [f"MLflow: {store}"]
    assert MlflowClient(store).get_run(first.ids["mlflow"]).info.status == "KILLED"
    second = Tracking(cfg, folder, resume=True, is_sweep=True)
    with second.running(display):
        (tmp_path / "best.yaml").write_text("learning_rate: 1")
        second.add_result({"eval_loss": 0.5}, ["best.yaml", "missing.html"])
    assert second.ids == first.ids
    (tmp_path / "trackers.json").unlink()  # an earlier version wrote it to the sweep's own file
    third = Tracking(cfg, folder, resume=True, is_sweep=True, saved=earlier_tracker_runs({"mlflow": first.ids["mlflow"]}))
    with third.running(display):
        assert third.ids == first.ids
    found = MlflowClient(store).get_run(first.ids["mlflow"])
    assert [file.path for file in MlflowClient(store).list_artifacts(found.info.run_id)] == ["best.yaml"]
    assert (found.info.status, found.info.run_name, found.data.metrics) == ("FINISHED", tmp_path.name, {"best/eval_loss": 0.5})


@pytest.mark.processes
def test_files_of_trackers_reach_a_uri(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's and W&B's are written here, and copied."""
    monkeypatch.delenv("WANDB_DIR", raising=False)
    where = s3.uri("runs/mine")
    cfg = config(use_tensorboard=True, wandb_project="p", wandb_mode="offline", output_dir=where)
    tracking = Tracking(cfg, Folder(where), resume=False)
    with tracking.running(Notes()):
        tracking.log([{"step": 1, "loss": 0.5, "time": time.time()}])
    names = [name.removeprefix("runs/mine/") for name in s3.objects()]
    assert "trackers.json" in names
    assert [name for name in names if name.startswith("tensorboard/events.out.tfevents.")]
    assert [name for name in names if name.startswith("wandb/offline-run-") and name.endswith(".wandb")]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("error", "status", "exit_code"), [(RunStopped("SIGTERM"), "KILLED", 255), (RunFailed("no"), "FAILED", 1)]
)
def test_how_a_run_has_ended_is_told(error: Exception, status: str, exit_code: int, tmp_path: Path) -> None:
    where, store = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    where.mkdir()
    cfg = config(use_mlflow=True, mlflow_tracking_uri=store, use_wandb=True, wandb_mode="offline", output_dir=str(where))
    tracking = Tracking(cfg, Folder(where), resume=False)
    with suppress(RunStopped, RunFailed), tracking.running(Notes()):
        tracking.log([{"step": 1, "loss": 0.5}])
        raise error
    kept = json.loads((where / "trackers.json").read_text())
    assert MlflowClient(store).get_run(kept["mlflow"]["id"]).info.status == status
    assert [run.exit_code for run in offline_runs(where / "wandb")] == [exit_code]
