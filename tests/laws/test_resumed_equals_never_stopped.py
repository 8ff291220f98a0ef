"""Law 4: killed and resumed equals never killed: bit for bit at the same number of workers, at another one up to rounding."""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_pt_utils import safe_globals

from benchmarks.processes import free_port, spawn
from strategies.checkpoints.manifest import is_complete, read_manifests
from tests.laws.runs import LORA, alike, built, losses, prepared, trained
from tests.laws.sharded import KINDS, resume_worker
from tests.tiny import save_tiny

SAVED = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 9, "num_epochs": 2.0, "micro_batch_size": 3}
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {**LORA, "lora_dropout": 0.2},
    "evaluated": {"eval_steps": 3, "load_best_model_at_end": True, "early_stopping_patience": 5},
    "forwards": {"tokens_per_forward": 100, "lr_scheduler": "cosine", "warmup_steps": 4},
    "groups": {"embedding_lr": 1e-2, "lr_scheduler": "rex"},
    "adafactor": {"optimizer": "adafactor"},
    "rmsprop": {"optimizer": "rmsprop"},
    "plain_adamw": {"optimizer": "adamw_torch"},
    "simpo": {"rl": "simpo"},
    "orpo": {"rl": "orpo", **LORA},
    "kto": {"rl": "kto", **LORA, "lora_dropout": 0.2},
}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


def records(trainer: Any) -> list[dict[str, float]]:
    unlike = ("train_loss", "step_time")
    entries = map(alike, trainer.state.log_history)
    return [{name: value for name, value in entry.items() if name not in unlike} for entry in entries]


@pytest.mark.parametrize("name", list(RUNS))
def test_resumed_equals_never_stopped(name: str, tmp_path: Path) -> None:
    """From the middle of an epoch and from its end."""
    keys = {**SAVED, **RUNS[name]}
    rows = prepared(17, keys)  # 6 steps an epoch
    quiet = trained(tmp_path / "quiet", rows=rows, **keys)
    for step in (3, 6):
        resumed = built(tmp_path / "quiet", rows=rows, **keys)
        torch.manual_seed(step)  # what the new process draws before it resumes is of no account
        resumed.train(resume_from_checkpoint=str(tmp_path / "quiet" / f"checkpoint-{step}"))
        for parameter, value in weights(quiet).items():
            assert torch.equal(weights(resumed)[parameter], value), parameter
        assert records(resumed)[:-1] == records(quiet)[:-1]
        assert len(losses(resumed)) == 12


GENERATED = {
    "num_generations": 4,
    "steps_per_generation": 4,
    "max_completion_length": 8,
    "beta": 0.04,
    "reward_funcs": ["tests.reward_functions.length"],
}
"""Checkpoints, every third step, are written between steps of one generation."""
PAUSES: dict[str, dict[str, Any]] = {
    "dpo": {"eval_strategy": "epoch"},
    "ends in an epoch": {"max_steps": 8, "eval_steps": 3, "load_best_model_at_end": True},
    "stops early": {"eval_steps": 3, "early_stopping_patience": 1, "num_epochs": 4.0, "learning_rate": 0.3},
    "ipo": {"rl": "ipo", "eval_steps": 3},
    "kto": {"rl": "kto", **LORA, "lora_dropout": 0.3, "num_epochs": 1.0, "save_steps": 2, "eval_steps": 4},
    "simpo": {"rl": "simpo", "gradient_accumulation_steps": 2, "micro_batch_size": 2},
    "orpo": {"rl": "orpo", **LORA, "lora_dropout": 0.3},
    "grpo": {"rl": "grpo", "micro_batch_size": 4, "num_epochs": 1.0, "trl": GENERATED},
    "logs rarely": {"logging_steps": 4, "eval_steps": 5},
    "kto logs rarely": {"rl": "kto", **LORA, "num_epochs": 1.0, "save_steps": 2, "logging_steps": 3},
    "grpo logs rarely": {"rl": "grpo", "micro_batch_size": 4, "num_epochs": 1.0, "trl": GENERATED, "logging_steps": 5},
    "evaluates first": {"eval_on_start": True, "eval_steps": 3, "early_stopping_patience": 2, "learning_rate": 0.3},
    "keeps one": {"save_total_limit": 1},
}
"""Kinds of runs that are killed anywhere."""


class Killed(Exception):
    """What a test ends a run by."""


class KillAfter(TrainerCallback):
    """Ends the run at the so many-th thing that happens in it: a step begins or ends, an evaluation, a checkpoint, the end."""

    def __init__(self, left: float) -> None:
        self.left, self.seen = left, 0

    def _count(self, *_: Any, **__: Any) -> None:
        self.seen += 1
        if self.seen > self.left:
            raise Killed

    on_step_begin = on_step_end = on_evaluate = on_save = on_epoch_end = on_train_end = _count


class KillInSave:
    """Ends the run before the so many-th file of a checkpoint is opened for writing, or takes its place."""

    def __init__(self, folder: Path, left: float) -> None:
        self.folder, self.left, self.seen = f"{folder}/checkpoint-", left, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "os.rename" or (event == "open" and set(arguments[1] or "") & set("wax"))
        if writes and str(arguments[0]).startswith(self.folder):
            self.seen += 1
            if self.seen > self.left:
                raise Killed


_watching: list[KillInSave] = []
"""What audits this process now; Python keeps a hook for ever."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watching if event in ("open", "os.rename") else ():
        watch(event, arguments)


@pytest.fixture(scope="module", autouse=True)
def audited() -> None:
    sys.addaudithook(_audit)


def newest(folder: Path) -> str | None:
    """The newest checkpoint that is complete."""
    found = [path for path in folder.glob("checkpoint-*") if is_complete(path)]
    return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None


def go_on(folder: Path, keys: dict[str, Any], left: float = math.inf, saving: float = math.inf) -> tuple[Any, int, int]:
    """Train from the newest checkpoint on, until it is over or killed; the trainer, and how much happened, in saves besides."""
    killing, watch = KillAfter(left), KillInSave(folder, saving)
    trainer = built(folder, rows=prepared(17, keys), **keys)
    trainer.add_callback(killing)
    torch.manual_seed(killing.seen)
    _watching[:] = [watch]
    with contextlib.suppress(Killed):
        trainer.train(resume_from_checkpoint=newest(folder))
    _watching.clear()
    return trainer, killing.seen, watch.seen


@dataclass(frozen=True)
class Quiet:
    """What a run of `PAUSES` comes to that nobody kills."""

    steps: int
    records: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    things: int
    """That happen in it, as `KillAfter` counts."""
    files: int
    """That its checkpoints open for writing or put in their places."""


@pytest.fixture(scope="module")
def quiet_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Quiet]:
    """`quiet_run(name)`: all tests of a kind of run compare with the same one."""

    @cache
    def make(name: str) -> Quiet:
        trainer, things, files = go_on(tmp_path_factory.mktemp("quiet"), {**SAVED, **PAUSES[name]})
        return Quiet(trainer.state.global_step, records(trainer), weights(trainer), things, files)

    return make


def chosen(number: int, name: str, seed: int) -> list[int]:
    """Where a run is killed, of so many places: at some by chance, and at the last."""
    return [*random.Random(f"{name}{seed}").choices(range(number), k=3 if seed else 2), number - 1]


MORE = (pytest.mark.many, pytest.mark.release)
# The first seed takes a test without a mark of cost less than what it may take.
SEEDS = pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=MORE) for seed in (1, 2))])


@SEEDS
@pytest.mark.parametrize("name", list(PAUSES))
def test_killed_anywhere_and_resumed_equals_never_killed(
    name: str, seed: int, tmp_path: Path, quiet_run: Callable[[str], Quiet]
) -> None:
    """Several times, at points by chance, among them the end; what is finished stays as it is."""
    keys, quiet = {**SAVED, **PAUSES[name]}, quiet_run(name)
    for left in chosen(quiet.things, name, seed):
        go_on(tmp_path / "killed", keys, left)
    _same_as(quiet, tmp_path / "killed", keys)


@SEEDS
@pytest.mark.parametrize("name", ["dpo", "kto", "grpo", "keeps one"])
def test_killed_while_it_saves_and_resumed_equals_never_killed(
    name: str, seed: int, tmp_path: Path, quiet_run: Callable[[str], Quiet]
) -> None:
    """Between two files of a checkpoint, some by chance, and before the last one takes its place."""
    keys, quiet = {**SAVED, **PAUSES[name]}, quiet_run(name)
    assert quiet.files > 20
    for saving in chosen(quiet.files, name, seed):
        go_on(tmp_path / "killed", keys, saving=saving)
    _same_as(quiet, tmp_path / "killed", keys)


@pytest.mark.parametrize("first", [0, 3])
def test_a_whole_checkpoint_stays_wherever_a_save_is_killed(
    tmp_path: Path, first: int, quiet_run: Callable[[str], Quiet]
) -> None:
    """With one that is kept: killed before every third file of the checkpoints after the first."""
    keys, number = {**SAVED, **PAUSES["keeps one"]}, quiet_run("keeps one").files
    for saving in range(number // 4 + first, number, 6):
        go_on(tmp_path / f"{saving}", keys, saving=saving)
        assert newest(tmp_path / f"{saving}") is not None, saving


def test_a_checkpoint_is_whole_beside_one_of_a_later_step_that_is_not(tmp_path: Path) -> None:
    """What a killed run has left unfinished is removed in place of what has just been written."""
    keys = {**SAVED, **PAUSES["keeps one"], "max_steps": 6}
    (tmp_path / "run" / "checkpoint-12").mkdir(parents=True)
    go_on(tmp_path / "run", keys)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert (tmp_path / "run" / "checkpoint-6" / "model.safetensors").is_file() and newest(tmp_path / "run") is not None


def test_a_best_checkpoint_elsewhere_takes_no_ones_place(tmp_path: Path) -> None:
    """As after a run was resumed in another folder: what is there is counted, not what isn't."""
    keys = {**SAVED, "save_total_limit": 2, "max_steps": 6}
    trainer = built(tmp_path / "run", rows=prepared(17, keys), **keys)
    (tmp_path / "elsewhere" / "checkpoint-3").mkdir(parents=True)
    trainer.state.best_model_checkpoint = str(tmp_path / "elsewhere" / "checkpoint-3")
    folders = [tmp_path / "run" / f"checkpoint-{step}" for step in (1, 2, 3)]
    for folder in folders:
        folder.mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-best").mkdir()  # somebody's own
    trainer._rotate(folders[2], 2)
    left = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-3", "checkpoint-best"]


def _same_as(quiet: Quiet, folder: Path, keys: dict[str, Any]) -> None:
    """What goes on in a folder until its end is the run that was never killed, and going on once more changes nothing."""
    for _ in range(2):
        resumed, *_ = go_on(folder, keys)
        assert resumed.state.global_step == quiet.steps
        assert records(resumed)[:-1] == quiet.records[:-1]
        found = weights(resumed)
        for parameter, value in quiet.weights.items():
            assert torch.equal(found[parameter], value), parameter


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process, and then two under every engine, have trained, saved and resumed."""
    folder = tmp_path_factory.mktemp("resumed")
    tiny = {"base_model": save_tiny(folder / "base"), "rl": "simpo"}
    kinds = {"full": tiny, "lora": {**tiny, **LORA, "lora_dropout": 0.1}}
    resume_worker(0, 1, 0, str(folder), {"one-full": ("ddp", {**tiny, "micro_batch_size": 4}, ())})
    runs = {}
    for engine, kind in KINDS:
        own = (f"{engine}-{kind}",)
        others = ("one-full",) if (engine, kind) == ("ddp", "full") else ()
        runs[f"{engine}-{kind}"] = (engine, {**kinds[kind], "micro_batch_size": 2}, (*own, *others))
    synced = {**tiny, "rl": "dpo", "trl": {"sync_ref_model": True, "ref_model_sync_steps": 2}, "micro_batch_size": 2}
    runs["zero2-synced"] = ("zero2", synced, ("zero2-synced",))
    spawn(resume_worker, 2, 2, free_port(), str(folder), runs)
    return folder


@pytest.mark.parametrize(("engine", "kind"), [*KINDS, ("zero2", "synced")])
def test_two_processes_resumed_equal_two_never_stopped(two_processes: Path, engine: str, kind: str) -> None:
    name = f"{engine}-{kind}"
    quiet, resumed = (load_file(two_processes / f"{name}-{run}.safetensors") for run in ("quiet", name))
    assert quiet.keys() == resumed.keys()
    for parameter, value in quiet.items():
        assert torch.equal(resumed[parameter], value), parameter
    names = {path.name for path in (two_processes / name / "checkpoint-3").iterdir()}
    assert {f"state-0000{rank}-of-00002.safetensors" for rank in (0, 1)} <= names
    assert ("model.safetensors" in names or "adapter_model.safetensors" in names) == (engine not in ("zero3", "fsdp2"))


def test_another_number_of_processes_goes_on_with_the_same_run(two_processes: Path) -> None:
    quiet, other = (load_file(two_processes / f"ddp-full-{run}.safetensors") for run in ("quiet", "one-full"))
    for parameter, value in quiet.items():
        torch.testing.assert_close(other[parameter], value, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_whole_and_without_pickles(tmp_path: Path) -> None:
    trainer = trained(tmp_path, **SAVED)
    folder = tmp_path / "checkpoint-3"
    manifest = read_manifests(folder)[0]
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest-00000-of-00001.json"}
    assert {"model.safetensors", "state-00000-of-00001.safetensors", "scheduler.pt", "trainer_state.json"} <= set(
        manifest["files"]
    )
    assert manifest["identity"]["strategy"] == "dpo"
    kinds = {file.suffix for file in folder.iterdir()}
    assert kinds <= {".safetensors", ".json", ".jinja", ".pt", ".pth", ".md"}
    with safe_globals():
        for file in folder.glob("*.pt*"):
            assert torch.load(file, weights_only=True)
    assert trainer.is_sharded is False


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, **SAVED)
    file = tmp_path / "checkpoint-3" / "state-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint-3 is damaged: state-00000-of-00001.safetensors has .* bytes, not"):
        built(tmp_path, **SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, **SAVED)
    with pytest.raises(ValueError, match="another run's\n  strategy: was dpo, is simpo"):
        built(tmp_path, rl="simpo", **SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match="trained parameters: was 21 of shapes .*, is 28 of shapes"):
        built(tmp_path, **LORA, **SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_without_optimizer_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, **SAVED, save_only_model=True)
    with pytest.raises(ValueError, match="saved with save_only_model, so there is no optimizer to go on with"):
        built(tmp_path, **SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
