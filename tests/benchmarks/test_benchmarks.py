"""Every benchmark runs, at its smallest, and prints its table; how fast anything is, is not asserted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    inspection,
    joint_forwards,
    plan_at_scale,
    prepare,
    scale,
    sharding_memory,
    slots,
    sweep_cost,
    training,
    utilisation,
)

pytestmark = pytest.mark.benchmark

ROOT = Path(__file__).parents[2]
SIDES = ("chosen", "rejected")


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


@pytest.mark.release
def test_slots_compares_memory_and_starts(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    slots.main([*small, "--slots", "1", "3"])
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line]
    one, three = (next(row for row in cells if row[0] == number) for number in ("1", "3"))
    assert one[3] == "1.00x" and not one[-1] and float(three[-1]) > 0
    assert float(three[3].removesuffix("x")) < 1.5


def test_utilisation_shows_steps_a_profile_and_the_heads(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    utilisation.main([*small, "--bf16"])
    output = capsys.readouterr().out
    for part in ("bf16 autocast reaches", "one step, fp32", "linear layers: products", "head on", "frozen"):
        assert part in output


def test_joint_forwards_are_compared_with_turns(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--slots", "2", "--tokens", "8", "12", "--repeats", "1", "--steps", "4"]
    joint_forwards.main([*small, "--tiny", *sizes])
    output = capsys.readouterr().out
    assert "2 trials of LoRA r 8 on a tiny model" in output
    assert len(re.findall(r"│ (8|12) +│ +\d+\.\d +│ +\d+\.\d +│", output)) == 2


@pytest.mark.parametrize("shape", ["chat", pytest.param("plain", marks=pytest.mark.release)])
def test_prepare_compares_with_datasets_map(
    ray_session: Any, tiny_base: str, capsys: pytest.CaptureFixture[str], shape: str, tmp_path: Path
) -> None:
    prepare.main(["--model", tiny_base, "--pairs", "20", "--words", "3", "--rounds", "1", "--shape", shape])
    output = capsys.readouterr().out
    assert "datasets.map" in output
    assert "most private memory" in output


@pytest.mark.release
def test_scale_compares_two_numbers_of_pairs(ray_session: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scale.main(["--pairs", "30", "--beside", "20", "--steps", "1", "--folder", str(tmp_path)])
    output = capsys.readouterr().out
    assert "score (stand-in)" in output
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    (workers,) = (row for row in cells if row[:2] == ["train", "workers"])
    # Private memory of both runs, which some weights at least take, and the difference.
    private, more, difference = (int(workers[index].replace(",", "")) for index in (2, 4, -1))
    assert private > 50 and more > 50
    assert abs(more - private - difference) <= 1
    assert not list(tmp_path.iterdir())


def test_the_plan_is_simulated_without_ray(tiny_base: str, tmp_path: Path) -> None:
    """In a process of its own, in which nothing has imported Ray."""
    rows = [{"conversations": [{"from": "human", "value": "?"}], **{side: {"from": "gpt", "value": side} for side in SIDES}}]
    (tmp_path / plan_at_scale.REAL[0]).write_text(json.dumps(rows))
    arguments = [
        "--workers",
        "2",
        "--pairs-per-worker",
        "2",
        "--steps",
        "1",
        "--json",
        "--data",
        str(tmp_path),
        "--model",
        tiny_base,
    ]
    program = (
        f"import sys; from benchmarks import plan_at_scale; plan_at_scale.main({arguments}); assert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [note.split(":")[0] for note in found["notes"]] == [f"without {plan_at_scale.REAL[1]}"]
    assert {record["distribution"] for record in found["records"]} == {
        "dpo_en_demo.json",
        *map("log-normal, sigma {}".format, (0.6, 1.2)),
    }
    # Equal pairs are shared out equally.
    (packed, padded) = (record for record in found["records"] if record["distribution"] == plan_at_scale.REAL[0])
    assert packed["imbalance"] == padded["imbalance"] == 1 and packed["pairs"] == 4


@pytest.mark.release
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
