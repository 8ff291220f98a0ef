"""What memory a worker is said to take, and how `prefray doctor` ends."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import load_config, parse_config
from pipeline.doctor.machine import Machine
from pipeline.doctor.memory import HELD_PER_ROW, Diagnosis, Room, check_rows, diagnose, this_machine, usable, verdict
from pipeline.errors import RunFailed, UserError
from pipeline.io.cache import NodeCache
from pipeline.planning import check_cache, row_bytes
from strategies.memory import Measured
from tests.pipeline.data.conftest import prepare_here, write_jsonl
from tests.tiny import pairs, tiny_model, tiny_tokenizer

runner = CliRunner()
GIB = 2**30


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: str) -> Path:
    path = tmp_path / "recipe.yaml"
    (tmp_path / "pairs.jsonl").touch()
    path.write_text(
        f"base_model: {tiny_base}\nrl: dpo\ndatasets:\n  - path: {tmp_path}/pairs.jsonl\nsequence_len: 64\n"
        f"output_dir: {tmp_path}/run\ndataset_prepared_path: {tmp_path}/prepared\n"
    )
    return path


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.doctor.memory.this_machine", lambda _: Machine("CPU", 2 * GIB, GIB))


def find(base: str, **keys: object) -> Diagnosis:
    return diagnose(parse_config({"base_model": base, "rl": "dpo", "datasets": [{"path": "x.jsonl"}], **keys}))


def test_a_recipe_that_fits(recipe: Path) -> None:
    result = runner.invoke(app, ["doctor", str(recipe), "--quiet"])
    assert result.exit_code == 0, result.stderr
    for item in ("weights", "gradients", "optimizer state", "activations", "token head", "process", "total"):
        assert re.search(rf"{item} +│ +\d+ │", result.stdout), item
    assert not re.search("reference model +│", result.stdout)
    assert "packed rows of at most 128 tokens" in result.stdout
    assert "126 tokens at sequence_len: 64" in result.stdout
    assert "cached: scored before training" in result.stdout
    assert "this machine has 2,048 MiB" in result.stdout
    assert "fits: a worker needs 0.6" in result.stdout


def test_rows_are_counted_once_they_are_prepared(recipe: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", pairs(9))
    cfg = load_config(recipe, ["sequence_len=512"])
    before = diagnose(cfg)
    assert "not prepared yet" in next(check.finding for check in before.checks if check.name == "rows")
    prepared = prepare_here(cfg)
    assert check_rows(cfg)[1] == 9 * HELD_PER_ROW
    table = prepared.read("train", ["row_id", "prompt_ids", "chosen_ids", "rejected_ids"])
    answers = sum(map(len, table["chosen_ids"].to_pylist() + table["rejected_ids"].to_pylist()))
    size, tokens = row_bytes(cfg, prepared)
    scores = 4 * answers + 2 * 4 * 9
    assert size - scores == pytest.approx(table.nbytes, rel=0.05)
    after = diagnose(cfg)
    found = next(check.finding for check in after.checks if check.name == "rows")
    assert f"9 with {tokens:,} tokens" in found and str(NodeCache.of(cfg.ray).root) in found
    assert after.estimate.total - before.estimate.total == after.estimate.rows == 9 * HELD_PER_ROW
    small = check_rows(load_config(recipe, ["sequence_len=512", "ray.cache_size=0.001MB"]))[0]
    assert small.status == "fail" and small.finding.endswith("; ray.cache_size allows 0.001MB: set more")
    with pytest.raises(UserError, match=r"^ray.cache_size: the rows and their scores take about 0.0MB .*; set 0.1MB or"):
        check_cache(load_config(recipe, ["ray.cache_size=0.001MB"]), prepared)
    check_cache(load_config(recipe, ["ray.cache_size=1MB"]), prepared)
    live = load_config(recipe, ["sequence_len=512", "reference=live"])
    assert row_bytes(live, prepared)[0] == size - scores


def test_a_checkpoint_is_counted(recipe: Path) -> None:
    result = runner.invoke(app, ["doctor", str(recipe), "--quiet"])
    assert re.search(r"pass │ checkpoint +│ up to 0\.0 GiB, of which a node holds one at most", result.stdout), result.stdout


def test_a_recipe_that_does_not_fit(recipe: Path) -> None:
    result = runner.invoke(app, ["doctor", str(recipe), "--set", "ray.num_workers=4", "--quiet"])
    assert result.exit_code == 1
    assert "DDP's buckets" in result.stdout
    assert "doesn't fit: 4 workers of 0.6" in result.stderr
    assert "fewer workers per node (ray.num_workers)" in result.stderr
    assert "adapter: lora" in result.stderr


def test_a_wrong_recipe(recipe: Path) -> None:
    result = runner.invoke(app, ["doctor", str(recipe), "--set", "rl_bta=1"])
    assert result.exit_code == 2
    assert "rl_bta: unknown key; did you mean 'rl_beta'?" in result.stderr
    result = runner.invoke(app, ["doctor", str(recipe), "--set", "base_model=/nowhere"])
    assert result.exit_code == 2
    assert "prefray: base_model: no such folder: '/nowhere'" in result.stderr


def test_measuring_is_shown_beside_the_prediction(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Measured(base=100, loading=GIB // 4, training=GIB // 2, tokens=128, seconds=1.0, gpu=False)
    monkeypatch.setattr("strategies.memory.measure_peak", lambda *_: taken)
    result = runner.invoke(app, ["doctor", str(recipe), "--measure", "--quiet"])
    assert result.exit_code == 0, result.stderr
    assert re.search(r"measured in training +│ +512 │", result.stdout)
    assert re.search(r"measured in loading +│ +256 │", result.stdout)
    assert re.search(r"off by +│ +\+\d+ % │", result.stdout)
    divided = ["--set", "deepspeed=zero3", "--set", "ray.num_workers=2"]
    result = runner.invoke(app, ["doctor", str(recipe), "--measure", "--quiet", *divided])
    assert re.search(r"total of an undivided model +│ +6\d\d │", result.stdout)


def test_a_measurement_that_dies(tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise RuntimeError("--measure: killed by signal 9")

    monkeypatch.setattr("strategies.memory.measure_peak", die)
    cfg = parse_config({"base_model": tiny_base, "datasets": [{"path": "x.jsonl"}]})
    with pytest.raises(RunFailed, match="killed by signal 9"):
        diagnose(cfg, with_measurement=True)


def test_how_batches_are_made(tiny_base: str) -> None:
    checks = {check.name: check for check in find(tiny_base, attn_implementation="eager", sequence_len=64).checks}
    assert checks["batches"].status == "warn"
    assert checks["batches"].finding.endswith("not packed: attn_implementation: eager doesn't take the mask")
    checks = {check.name: check for check in find(tiny_base, sequence_len=64, tokens_per_forward=100).checks}
    assert checks["tokens_per_forward"].status == "warn"
    assert "a pair of 126 tokens" in checks["tokens_per_forward"].finding


def test_what_the_allocator_keeps_is_said(tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    findings = [check.finding for check in find(tiny_base, sequence_len=64).checks if check.name == "allocator"]
    assert "MALLOC_TRIM_THRESHOLD_=1000000" in findings[0]
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert "allocator" not in [check.name for check in find(tiny_base, sequence_len=64).checks]


def test_a_live_reference(tiny_base: str) -> None:
    found = find(tiny_base, reference="live", sequence_len=64)
    assert found.estimate.reference > 4 * sum(weight.numel() for weight in tiny_model(tiny_tokenizer()).parameters())
    assert "live: the reference answers beside the policy" in [check.finding for check in found.checks]


def test_the_verdict_names_what_saves_most_first(tiny_base: str) -> None:
    cfg = parse_config({"base_model": tiny_base, "rl": "dpo", "reference": "live", "datasets": [{"path": "x.jsonl"}]})
    found = diagnose(cfg)
    big = replace(found, estimate=replace(found.estimate, optimizer=8 * GIB, activations=5 * GIB, reference=GIB))
    words = verdict(cfg, big)
    places = [words.index(word) for word in ("adapter: lora", "gradient_checkpointing: true", "reference: cached")]
    assert places == sorted(places)
    assert "tokens_per_forward (now 2048)" in words
    busy = replace(found, room=Room(Machine("CPU", 2 * GIB, 1000), 1))
    assert verdict(cfg, busy).startswith("fits, once others make room: ")


def test_no_model(tiny_base: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="base_model: no model config could be loaded from"):
        find(str(tmp_path))


def test_this_machine_has_memory() -> None:
    machine = this_machine(use_gpu=False)
    assert machine.kind == "CPU"
    assert 0 < machine.free <= machine.total
    assert usable(machine) < machine.total


def test_a_sharded_run_takes_less(tiny_base: str) -> None:
    keys: dict[str, object] = {"sequence_len": 64, "ray": {"num_workers": 2}}
    whole, found = find(tiny_base, **keys), find(tiny_base, deepspeed="zero3", **keys)
    said = {check.name: check.finding for check in found.checks}
    divided = "zero3 divides weights, gradients and the optimizer's state among 2 workers; its buffers are not counted"
    assert said["sharding"] == divided
    assert found.estimate.optimizer == whole.estimate.optimizer // 2
    assert found.estimate.checkpoint == whole.estimate.checkpoint
