"""Every benchmark runs, at its smallest, and prints its table; how fast anything is, is not asserted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import inspection, prepare, sharding_memory, sweep_cost, training, utilisation

pytestmark = pytest.mark.benchmark


@pytest.fixture(scope="module")
def small(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that make a benchmark take a second: a tiny model, a few short pairs."""
    rows = [
        {
            "conversations": [{"from": "human", "value": f"What is {row} plus one?"}],
            "chosen": {"from": "gpt", "value": f"It is {row + 1}" + "!" * row},
            "rejected": {"from": "gpt", "value": "No idea" + "." * (5 - row)},
        }
        for row in range(6)
    ]
    data = tmp_path_factory.mktemp("pairs") / "pairs.json"
    data.write_text(json.dumps(rows))
    sizes = ["--batch", "2", "--steps", "2", "--sequence-len", "128", "--threads", "1"]
    return ["--model", tiny_base, "--data", str(data), *sizes]


def test_training_compares_both_settings_of_the_peer(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    training.main([*small, "--rows-near", "60"])
    output = capsys.readouterr().out
    assert "TRL (shipped, 2 pairs a forward) and ours, 2 pairs a step, fp32" in output
    assert "TRL (best, 2 pairs a forward)" in output
    # Same pairs, same weights, same order.
    apart = [float(found) for found in re.findall(r"at most\s+(\S+)\s+apart", output)]
    assert len(apart) == 2
    assert max(apart) < 1e-4


def test_training_compares_pairs_about_pictures(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tower-width", "32", "--tower-layers", "2", "--picture-side", "64", "--sequence-len", "256"]
    training.main([*small, *sizes, "--vision"])
    output = capsys.readouterr().out
    assert "TRL (shipped, 2 pairs a forward) and ours" in output and "TRL (best, " in output
    assert re.search(r"tower and connector \d+% of 0M parameters, 16 tokens a picture", output)
    # Same pictures, same pairs, same weights, same order.
    apart = [float(found) for found in re.findall(r"at most\s+(\S+)\s+apart", output)]
    assert len(apart) == 2 and max(apart) < 1e-4


@pytest.mark.parametrize("side", training.SIDES)
def test_training_measures_the_memory_of_a_side(small: list[str], capsys: pytest.CaptureFixture[str], side: str) -> None:
    training.main([*small, "--side", side, "--peer-settings", "best"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["peak"] >= found["before"] > 2**20


def test_sweep_cost_counts_reference_forwards(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Besides its own each trial compares policy and reference on the first of its two batches."""
    sweep_cost.main([*small, "--trials", "2"])
    forwards = [line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [text for text in forwards if text] == ["2", "4", "2", "2"]  # 1 + 2/2, 2 x (1 + 2/2)


def test_utilisation_shows_steps_a_profile_and_the_heads(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    utilisation.main([*small, "--bf16"])
    output = capsys.readouterr().out
    for part in ("bf16 autocast reaches", "one step, fp32", "linear layers: products", "head on", "frozen"):
        assert part in output


@pytest.mark.parametrize("shape", list(prepare.SHAPES))
def test_prepare_compares_with_datasets_map(
    ray_session: Any, tiny_base: str, capsys: pytest.CaptureFixture[str], shape: str, tmp_path: Path
) -> None:
    prepare.main(["--model", tiny_base, "--pairs", "20", "--words", "3", "--rounds", "1", "--shape", shape])
    output = capsys.readouterr().out
    assert "datasets.map" in output
    assert "most private memory" in output


def test_sharding_memory_counts_what_a_worker_holds(capsys: pytest.CaptureFixture[str]) -> None:
    sharding_memory.main(["--width", "64", "--layers", "1", "--vocabulary", "300", "--tokens", "16"])
    ratios = {
        line.split("│")[1].strip(): line.split("│")[7].strip() for line in capsys.readouterr().out.splitlines() if "│" in line
    }
    assert ratios["DDP"] == "1.00x" and set(ratios) >= set(sharding_memory.ENGINES)
    for name, most in {"ZeRO-2": 0.9, "ZeRO-3": 0.7, "FSDP2": 0.6}.items():
        assert float(ratios[name].removesuffix("x")) < most, name


def test_inspection_measures_the_stage_and_its_page(
    ray_session: Any, tiny_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inspection.main(["--model", tiny_base, "--pairs", "40", "--tokens", "12", "--against"])
    output = capsys.readouterr().out
    assert "40 scored pairs" in output and "from cached columns" in output
