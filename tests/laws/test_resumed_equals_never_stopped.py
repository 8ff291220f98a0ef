"""Law 4: killed and resumed equals never killed: bit for bit at the same number of workers, at another one up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_pt_utils import safe_globals

from benchmarks.processes import free_port, spawn
from strategies.checkpoints.manifest import read_manifests
from tests.laws.runs import LORA, built, losses, prepared, trained
from tests.laws.sharded import ENGINES, resume_worker
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
    "kto": {"rl": "kto"},
}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


def records(trainer: Any) -> list[dict[str, float]]:
    unlike = ("_runtime", "_per_second", "train_loss", "total_flos")
    return [{name: value for name, value in entry.items() if not name.endswith(unlike)} for entry in trainer.state.log_history]


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


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process, and then two under every engine, have trained, saved and resumed."""
    folder = tmp_path_factory.mktemp("resumed")
    tiny = {"base_model": save_tiny(folder / "base"), "rl": "simpo"}
    kinds = {"full": tiny, "lora": {**tiny, **LORA, "lora_dropout": 0.1}}
    resume_worker(0, 1, 0, str(folder), {"one-full": ("ddp", {**tiny, "micro_batch_size": 4}, ())})
    runs = {}
    for kind, keys in kinds.items():
        for engine in ENGINES:
            own = (f"{engine}-{kind}",)
            others = ("one-full",) if (engine, kind) == ("ddp", "full") else ()
            runs[f"{engine}-{kind}"] = (engine, {**keys, "micro_batch_size": 2}, (*own, *others))
    spawn(resume_worker, 2, 2, free_port(), str(folder), runs)
    return folder


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("engine", list(ENGINES))
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
