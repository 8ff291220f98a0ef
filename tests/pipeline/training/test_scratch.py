"""What workers put on their node's disk on the way to storage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import training_workers
from pipeline import train, tune
from pipeline.errors import RunFailed, UserError
from pipeline.io import lease
from pipeline.io.storage import Folder
from pipeline.runs.folder import RunFolder
from pipeline.runs.owner import OWNER, owned
from pipeline.runs.scratch import new_scratch, open_scratch, remove_everywhere, remove_scratch, scratch_of
from pipeline.tuning.folder import REPORT
from tests.leases import another, holder_of, take_over
from tests.pipeline.training.test_train import Recorder


def test_it_is_private_and_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    name = new_scratch()
    assert name != new_scratch()
    folder = open_scratch(name)
    assert folder == scratch_of(name) == tmp_path / name
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "checkpoint-3").mkdir()
    assert not list(open_scratch(name).iterdir())
    remove_scratch(name)
    remove_scratch(name)
    assert not list(tmp_path.iterdir())
    folder.symlink_to("/")
    with pytest.raises(ValueError, match="TMPDIR: .* is somebody else's"):
        open_scratch(name)


def test_each_driver_has_its_own_and_removes_that_of_the_one_before(tmp_path: Path) -> None:
    """But a copy of a run leaves that of the run that it is a copy of alone."""
    folder = RunFolder(tmp_path / "run")
    folder.storage.create()
    folder.start("prepared", 4)
    first = folder.known()
    folder.start("prepared", 4)
    second = folder.known()
    assert first["scratch"] != second["scratch"] and first["id"] == second["id"]
    assert (first["former_scratch"], second["former_scratch"]) == (None, first["scratch"])
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = RunFolder(tmp_path / "copy")
    copy.start("prepared", 4)
    assert copy.known()["former_scratch"] is None


def test_one_checkpoint_at_most(recipe: Any, ray_session: Any, tmp_path: Path) -> None:
    """A watching plugin fails the run otherwise; the best of six checkpoints is the model at the end."""
    watch = {"plugins": ["tests.pipeline.training.scratch_watch"]}
    keys = {"save_steps": 2, "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    result = train(recipe(tmp_path / "run", **keys, **watch))
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert not scratch_of(state["scratch"]).exists()
    assert (result.steps, len(RunFolder(tmp_path / "run").checkpoints())) == (12, 4)


def test_nodes_are_asked_to_remove_it(ray_session: Any) -> None:
    """Also those that this process isn't on, and not those that are gone."""
    node = ray_session.get_runtime_context().get_node_id()
    name = new_scratch()
    ray_session.get(ray_session.remote(num_cpus=0)(open_scratch).remote(name))
    remove_everywhere(name, {node, "0" * 56})
    assert not scratch_of(name).exists()


def test_a_run_whose_display_fails_writes_no_more(recipe: Any, ray_session: Any, tmp_path: Path) -> None:
    """Its folder is somebody else's from then on."""

    class Failing(Recorder):
        def record(self, record: dict[str, Any]) -> None:
            if record["step"] == 2:
                raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        train(recipe(tmp_path / "run", num_epochs=50, save_steps=1, eval_steps=200), display=Failing())
    folder = RunFolder(tmp_path / "run")
    assert not training_workers()
    assert not scratch_of((folder.state() or {})["scratch"]).exists()


def test_a_folder_that_another_writes_is_refused(recipe: Any, ray_session: Any, tmp_path: Path) -> None:
    """To a run and to a sweep."""
    with owned(Folder(tmp_path / "run")):
        with pytest.raises(UserError, match=r"output_dir: '.*run' is being written by process \d+ on .*; wait for its end"):
            train(recipe(tmp_path / "run"))
        section = {"space": {"learning_rate": {"grid": [1e-3]}}, "search": "grid"}
        with pytest.raises(UserError, match=r"output_dir: '.*run' is being written by process"):
            tune(recipe(tmp_path / "run", tune=section))


def test_a_run_whose_folder_was_taken_over_ends(recipe: Any, ray_session: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)

    class Away(Recorder):
        def record(self, record: dict[str, Any]) -> None:
            if record["step"] == 2:
                take_over(Folder(tmp_path / "run"), OWNER, another())

    with pytest.raises(RunFailed, match="was taken over by process 7 on node-7 while this process gave no sign of life"):
        train(recipe(tmp_path / "run", num_epochs=50, save_steps=1, eval_steps=200), display=Away())
    assert not training_workers()
    assert str(holder_of(Folder(tmp_path / "run"), OWNER)) == "process 7 on node-7"


def test_a_sweep_whose_folder_was_taken_over_ends(recipe: Any, ray_session: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """And writes nothing any more."""
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    folder, said = Folder(tmp_path / "sweep"), list[str]()

    class Away(Recorder):
        def log(self, text: str) -> None:
            said.append(text)
            if "step" in text:
                take_over(folder, OWNER, another())

    section = {"space": {"learning_rate": {"grid": [1e-3, 1e-4]}}, "search": "grid", "baseline": False}
    with pytest.raises(RunFailed, match="was taken over by process 7 on node-7 while this process gave no sign of life"):
        tune(recipe(tmp_path / "sweep", tune=section, num_epochs=50, save_steps=1, eval_steps=1), display=Away())
    assert not training_workers()
    assert said and not [text for text in said if "has finished" in text]
    assert str(holder_of(folder, OWNER)) == "process 7 on node-7"
    assert not (tmp_path / "sweep" / REPORT).exists()
