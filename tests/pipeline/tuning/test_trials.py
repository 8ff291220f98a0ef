"""Trials of a running sweep are ended and cloned by other processes: what is refused, and what comes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline import open_sweep, tune
from pipeline.cli import app
from pipeline.config import RunConfig
from pipeline.config.loading import parse_overrides
from pipeline.config.tuning import TuneConfig
from pipeline.errors import UserError
from pipeline.runs.folder import RunFolder
from pipeline.runs.owner import owned
from pipeline.tuning import requests
from pipeline.tuning.control import check_clone, check_stop
from pipeline.tuning.folder import SweepFolder
from pipeline.tuning.importance import importances
from pipeline.tuning.objective import Objective, resolve_objective
from pipeline.tuning.records import TrialRecord, keys_of
from pipeline.tuning.requests import CloneTrial, StopTrial, answer, forget, send, taken
from pipeline.tuning.search import SAMPLE, Perturb, plan_search
from pipeline.tuning.space import check_trials, corners
from pipeline.ui.display import SilentDisplay
from tests.waiting import wait_for

RATE = {"space": {"learning_rate": {"grid": [1e-4, 1e-5]}}, "search": "grid", "baseline": False}
METRICS = {"eval_loss": 0.5}


def record(number: int, status: Any = "running", **values: Any) -> TrialRecord:
    return TrialRecord(number, values or {"learning_rate": 1e-4}, status, f"{number:03d}", 4, 8, dict(METRICS))


def by_number(*records: TrialRecord) -> dict[int, TrialRecord]:
    return {one.number: one for one in records}


@pytest.mark.parametrize(
    ("records", "more", "message"),
    [
        ([record(0), record(1)], False, "there is no trial 3; the sweep's trials are: 0, 1"),
        ([], True, "there is no trial 3; the sweep's trials are: none yet"),
        ([record(0), record(3, "finished")], False, "trial 3 has finished already"),
        ([record(0), record(3, "stopped")], False, "trial 3 has ended already"),
        ([record(0), record(3, "failed")], False, "trial 3 has failed already"),
        ([record(0, "finished"), record(3)], False, "trial 3 is the last one that runs: without it the sweep would end; "),
    ],
)
def test_trials_that_cannot_be_ended(records: list[TrialRecord], more: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_stop(StopTrial(3), by_number(*records), more)


def test_trials_that_can_be_ended() -> None:
    for records, more in (
        ([record(3)], True),
        ([record(3), record(4, "waiting")], False),
        ([record(3, "paused"), record(0)], False),
    ):
        check_stop(StopTrial(3), by_number(*records), more)


def checked(cfg: RunConfig, request: CloneTrial, *records: TrialRecord) -> dict[str, Any]:
    assert cfg.tune is not None
    recipes = check_trials(cfg, corners(cfg.tune))
    return check_clone(request, by_number(*records), cfg, recipes, resolve_objective(cfg.tune, recipes))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (CloneTrial(7, {"learning_rate": 1e-3}), "there is no trial 7; the sweep's trials are: 3"),
        (CloneTrial(3), "a clone needs a changed value: --set learning_rate=2e-6"),
        (CloneTrial(3, {"learning_rate": 1e-4}), "trial 3 has these values already: learning_rate: 0.0001"),
        (CloneTrial(3, {"learning_rat": 1e-3}), "learning_rat: unknown key; did you mean 'learning_rate'"),
        (CloneTrial(3, {"learning_rate": -1}), "learning_rate: must be greater than 0, got -1"),
        (CloneTrial(3, {"output_dir": "x"}), "output_dir: belongs to the sweep as a whole, and a clone can't change it"),
        (CloneTrial(3, {"ray.num_workers": 2}), "ray.num_workers: belongs to the sweep as a whole"),
        (CloneTrial(3, {"plugins": ["os"]}), "plugins: belongs to the sweep as a whole"),
        (CloneTrial(3, {"num_epochs": 3}, warm_start=True), "num_epochs: can't change while a run goes on from a checkpoint"),
        (CloneTrial(3, {"rl_beta": 0.5}), "losses can't be compared where rl_beta differs"),
        (CloneTrial(3, {"rl": "simpo"}), "losses can't be compared where rl differs"),
        (CloneTrial(3, {"base_model": "nowhere/to/be/found"}), "nowhere/to/be/found"),
        (CloneTrial(3, {"datasets.0.path": "nothere.jsonl"}), "datasets.0.path: no such file or folder: 'nothere.jsonl'"),
    ],
)
def test_clones_that_are_refused(recipe: Any, tmp_path: Path, request_: CloneTrial, message: str) -> None:
    cfg = recipe(tmp_path / "sweep", {**RATE, "metric": "eval_loss"})
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is compared below
        checked(cfg, request_, record(3))
    assert message in str(refused.value)


def test_a_clone_that_cannot_share_is_refused_where_all_must(recipe: Any, tmp_path: Path) -> None:
    lora = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
    for share, error in ((True, "tune.share_base: true, but lora_modules_to_save: trains whole modules"), ("auto", None)):
        cfg = recipe(tmp_path / "sweep", {**RATE, "share_base": share}, **lora)
        with pytest.raises(UserError, match=error) if error else nullcontext():
            checked(cfg, CloneTrial(3, {"lora_modules_to_save": ["lm_head"]}), record(3))


def test_a_clone_has_the_others_values_but_those_that_change(recipe: Any, tmp_path: Path) -> None:
    cfg = recipe(tmp_path / "sweep", RATE)
    assert checked(cfg, CloneTrial(3, {"weight_decay": 0.1}), record(3)) == {"learning_rate": 1e-4, "weight_decay": 0.1}
    of_recipe = TrialRecord(0, None, "failed")
    assert checked(cfg, CloneTrial(0, {"learning_rate": 1e-3}, warm_start=True), of_recipe) == {"learning_rate": 1e-3}
    assert parse_overrides(["learning_rate=2e-6", "a.b=[x]"]) == {"learning_rate": 2e-6, "a.b": ["x"]}


def test_what_clones_change_is_a_column_but_no_sample_of_the_search() -> None:
    tune = TuneConfig.model_validate({"space": {"learning_rate": {"loguniform": [1e-6, 1e-3]}}})
    records = [TrialRecord(n, {"learning_rate": 10.0**-n}, metrics={"eval_a": -float(n)}) for n in range(3, 6)]
    clone = TrialRecord(9, {"learning_rate": 1e-4, "lora_r": 4}, metrics={"eval_a": 0.0}, clone_of=4)
    assert keys_of(tune.space, records) == ["learning_rate"] and keys_of(tune.space, [*records, clone])[1:] == ["lora_r"]
    assert importances(tune, [*records, clone], Objective("eval_a", "max")) == {}


def test_schedulers_and_searchers_take_clones(recipe: Any, tmp_path: Path) -> None:
    tune = TuneConfig.model_validate({"space": {"learning_rate": {"choice": [1e-4]}}, "scheduler": "pbt"})
    config = {
        SAMPLE: {"number": 9, "values": {"learning_rate": 1e-4, "weight_decay": 0.3}, "clone_of": 1, "start": {"step": 4}}
    }
    perturbed = Perturb(tune, {}, 7)(config)[SAMPLE]
    assert perturbed == {"number": 9, "values": {"learning_rate": 1e-4, "weight_decay": 0.3}, "clone_of": 1}
    cfg = recipe(tmp_path / "sweep", {**RATE, "search": "optuna", "space": {"learning_rate": {"choice": [1e-4, 1e-5]}}})
    measure = resolve_objective(cfg.tune, [cfg])
    search = plan_search(cfg.tune, measure, None, 4, 7).search
    search.suggest("t0")
    for trial in ("clone_00009", "t0"):
        search.on_trial_result(trial, {measure.first.metric: 0.5, "training_iteration": 1})
        search.on_trial_complete(trial, {measure.first.metric: 0.5})
    assert [len(search._ot_study.trials), search._ot_study.trials[0].value] == [1, 0.5]


@contextmanager
def driver(sweep: SweepFolder, react: Callable[[Any], tuple[str, bool]]) -> Iterator[None]:
    """A process that runs a sweep, as far as others see it."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(0.05):
            for name, request in taken(sweep):
                text, refused = react(request)
                answer(sweep, name, text, refused)

    thread = threading.Thread(target=loop)
    with owned(sweep.storage):
        forget(sweep)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@pytest.fixture
def sweep(recipe: Any, tmp_path: Path) -> SweepFolder:
    folder = SweepFolder(tmp_path / "sweep")
    folder.open(recipe(tmp_path / "sweep", RATE), resume=False)
    folder.write_records([record(0), record(1)])
    return folder


def test_a_driver_gets_requests_and_answers_them(sweep: SweepFolder) -> None:
    got: list[Any] = []

    def react(request: Any) -> tuple[str, bool]:
        got.append(request)
        return ("no", True) if request.trial == 7 else (f"did {request.trial}", False)

    sweep.requests.create()
    sweep.requests.write("old.request.json", '{"kind": "stop", "trial": 0}')  # of a driver that is gone
    with driver(sweep, react):
        handle = open_sweep(str(sweep.path))
        assert handle.stop(1) == "did 1"
        assert handle.clone(0, {"learning_rate": 1e-3}, warm_start=True) == "did 0"
        with pytest.raises(UserError, match="^no$"):
            handle.stop(7)
        sweep.requests.write("broken.request.json", '{"kind": "explode"}')
        wait_for(lambda: sweep.requests.read_json("broken.answer.json"))
        assert sweep.requests.read_json("broken.answer.json") == {"text": "the request is broken: 'explode'", "refused": True}
    assert got == [StopTrial(1), CloneTrial(0, {"learning_rate": 1e-3}, True), StopTrial(7)]
    assert not [name for name in sweep.requests.names() if not name.startswith("broken")]


def test_without_a_driver_nothing_is_asked(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner()
    stop = ["trials", str(sweep.path), "stop", "1"]
    for arguments, message in (
        (["trials", str(sweep.path) + "x", "stop", "1"], "holds no sweep; give the output_dir of one"),
        (stop, f"no process runs the sweep in {sweep.path}; continue it with `prefray tune --resume {sweep.path}`"),
        (["trials", str(sweep.path), "clone", "1", "--set", "learning_rate"], "--set learning_rate: expected key=value"),
    ):
        result = run.invoke(app, arguments)
        assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
    monkeypatch.setattr(requests, "ANSWER_WITHIN_S", 0.3)
    with owned(sweep.storage), pytest.raises(UserError, match="has not answered for 0 s: between two stages"):
        send(sweep, StopTrial(1))
    assert sweep.requests.names() == []
    sweep.write_state({"status": "finished"})
    result = run.invoke(app, stop)
    assert result.exit_code == 2 and "has finished; its trials can't be changed any more" in result.stderr


def test_the_command_shows_the_trials(sweep: SweepFolder) -> None:
    result = CliRunner().invoke(app, ["trials", str(sweep.path)])
    assert result.exit_code == 0, result.stderr
    # Its driver has died.
    assert result.stdout.count("waiting") == 2 and "learning_rate" in result.stdout
    with driver(sweep, lambda request: ("", False)):
        assert CliRunner().invoke(app, ["trials", str(sweep.path)]).stdout.count("running") == 2
        assert [one.status for one in open_sweep(str(sweep.path)).result.records] == ["running", "running"]
    assert [one.status for one in sweep.records()] == ["waiting", "waiting"]
    with driver(sweep, lambda request: (f"{request}", False)):
        result = CliRunner().invoke(app, ["trials", str(sweep.path), "clone", "1", "--set", "weight_decay=0.1", "--warm-start"])
    assert result.stdout == "CloneTrial(trial=1, changes={'weight_decay': 0.1}, warm_start=True)\n", result.stderr


class Notes(SilentDisplay):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.usefixtures("ray_session")
def test_a_trial_is_ended_and_another_cloned_while_a_sweep_runs(recipe: Any, tmp_path: Path) -> None:
    where = tmp_path / "sweep"
    section = {**RATE, "space": {"learning_rate": {"grid": [1e-4, 1e-5, 1e-6]}}, "scheduler": "asha", "grace_period": 1.0}
    cfg = recipe(where, section, num_epochs=40, eval_steps=40, save_steps=8, save_total_limit=100)
    said: list[str] = []
    display = Notes()

    def person() -> None:
        wait_for(lambda: RunFolder(where / "trials" / "000").last_checkpoint() and RunFolder(where / "trials" / "001").run_id)
        sweep = open_sweep(where)
        said.append(sweep.clone(0, {"learning_rate": 2e-4}, warm_start=True))
        said.append(sweep.clone(0, {"weight_decay": 0.1}))
        for number in (1, 2):
            said.append(sweep.stop(number))
        try:
            sweep.stop(1)
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=person)
    thread.start()
    result = tune(cfg, display=display)
    thread.join()
    assert [text.split(" from ")[0] for text in said[:2]] == [
        "trial 3 is a clone of trial 0 with learning_rate: 0.0002,",
        "trial 4 is a clone of trial 0 with weight_decay: 0.1,",
    ]
    assert said[2].startswith("trial 1 ends at step ") and said[3] == "trial 2 ends at step 0"
    assert said[4] == "trial 1 has ended already"
    assert [f"on request: {text}" for text in said[:4]] == [note for note in display.notes if note.startswith("on request")]
    first, stopped, waiting, warm, cold = result.records
    assert [one.status for one in result.records] == ["finished", "stopped", "stopped", "finished", "finished"]
    assert stopped.step < stopped.total_steps and waiting.step == 0 and waiting.folder is None
    assert warm.origins and warm.origins[0].startswith("trial 0 at step ") and not cold.origins
    assert (warm.clone_of, cold.clone_of, first.clone_of) == (0, 0, None)
    assert cold.values == {"learning_rate": 1e-4, "weight_decay": 0.1}
    assert result.table["weight_decay"].tolist()[4] == 0.1
    page = (where / "report.html").read_text()
    assert "clone of 0" in page and "went on from trial 0 at step" in page
