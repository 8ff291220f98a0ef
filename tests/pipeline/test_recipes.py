"""The packaged recipes: each trains, has a source, and can be named; the page that lists them tells the truth."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

import pipeline
import strategies
from pipeline.cli import app
from pipeline.config import RunConfig, load_config
from pipeline.config.loading import read_yaml
from pipeline.config.packaged import packaged_recipe, recipe_names
from pipeline.demo.pictures import picture_pairs
from pipeline.errors import UserError
from pipeline.tuning.space import check_trials, corners
from strategies.dataset_rows import ID_COLUMNS, ROW_ID
from strategies.methods.registry import get_strategy
from strategies.training import TrainDatasetMeta
from tests.tiny import save_tiny, tiny_gemma3, tiny_model, tiny_qwen3, tiny_tokenizer
from tests.tiny_vision import save_vision

ROOT = Path(__file__).parents[2]
PUBLISHED = [name for name in recipe_names() if name != "quickstart"]
runner = CliRunner()

FAMILIES: dict[str, Callable[..., Any]] = {"Qwen3": tiny_qwen3, "gemma-3": tiny_gemma3}
"""Part of a base model's name -> a tiny model of its architecture; the others are Llamas."""
VISION = {"SmolVLM": "idefics3"}
"""The same for models that take pictures: a family of `tests.tiny_vision`."""


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def conversations(row: int) -> dict[str, Any]:
    question = f"What is {row} plus {row}?"
    return {"chosen": turns(question, f"It is {2 * row}."), "rejected": turns(question, "No idea" + "." * row)}


def ultrafeedback(row: int) -> dict[str, Any]:
    found = conversations(row)
    scores = {"score_chosen": 8.5, "score_rejected": 6.0}
    return {"prompt": found["chosen"][0]["content"], "prompt_id": f"{row:064x}", **found, "messages": found["chosen"], **scores}


def tulu(row: int) -> dict[str, Any]:
    found = conversations(row)
    return {"id": f"mix-{row}", "prompt": found["chosen"][0]["content"], **found, "source": "a part of the mixture"}


def of_armorm(row: int) -> dict[str, Any]:
    found = conversations(row)
    answers = [found[name][1]["content"] for name in ("chosen", "rejected")]
    beside = {"all_generated_responses": answers, "all_rm_scores": [0.2, 0.1]}
    return {"prompt_id": f"{row:064x}", "prompt": found["chosen"][0]["content"], **beside, **found}


def capybara(row: int) -> dict[str, Any]:
    """Several turns, of which the last is the answer; `prompt` is no conversation but text."""
    shared = ("Hello!", "Hello, what can I do?", f"Add {row} to itself.")
    answers = {"chosen": turns(*shared, f"{2 * row}"), "rejected": turns(*shared, f"{2 * row + 1}, I think")}
    beside = {"source": "Airoboros", "conversation": [{"input": shared[0], "output": shared[1]}], "original_response": "4"}
    return {**beside, "prompt": "\n".join(shared), **answers, "rating_chosen": 5, "rating_rejected": 2}


def rlaif_v(row: int) -> dict[str, Any]:
    """A part that is a picture has no text, and a part that is text no picture."""
    pair = next(picture_pairs(held_out=False, seed=row, number=1))
    buffer = io.BytesIO()
    pair["images"][0].save(buffer, format="JPEG")
    prompt = [{**pair["prompt"][0], "content": [{"text": None, **part} for part in pair["prompt"][0]["content"]]}]
    answers = {
        name: [{"role": "assistant", "content": [{"text": pair[name][0]["content"], "type": "text"}]}]
        for name in ("chosen", "rejected")
    }
    return {"images": [f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"], "prompt": prompt, **answers}


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "HuggingFaceH4/ultrafeedback_binarized": ultrafeedback,
    "trl-lib/ultrafeedback_binarized": lambda row: {**conversations(row), "score_chosen": 8.5, "score_rejected": 6.0},
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": tulu,
    "princeton-nlp/llama3-ultrafeedback-armorm": of_armorm,
    "princeton-nlp/gemma2-ultrafeedback-armorm": of_armorm,
    "argilla/distilabel-capybara-dpo-7k-binarized": capybara,
    "HuggingFaceH4/rlaif-v_formatted": rlaif_v,
    "openai/gsm8k": lambda row: {"question": f"{row} clips and {row}?", "answer": f"<<{row}+{row}={2 * row}>>\n#### {2 * row}"},
}
"""Data set -> a row of its columns."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, str]:
    """Folder of a tiny model, for each family."""
    folders = {}
    for family in {tiny_model, *FAMILIES.values()}:
        folders[family] = save_tiny(tmp_path_factory.mktemp("base"))
        family(tiny_tokenizer()).save_pretrained(folders[family])
    return folders | {family: save_vision(tmp_path_factory.mktemp("base"), family) for family in VISION.values()}


def small(name: str, bases: dict[Any, str], folder: Path) -> list[str]:
    """What makes a run of two steps on one CPU of a recipe, on two where the model is divided; everything else stays."""
    recipe = read_yaml(Path(name))
    is_divided = not {"deepspeed", "fsdp_config"}.isdisjoint(recipe)
    families = {**FAMILIES, **VISION}
    family = next((family for part, family in families.items() if part in recipe["base_model"]), tiny_model)
    changes: dict[str, Any] = {
        "base_model": bases[family],
        "sequence_len": 256,
        "max_steps": 2,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "ray.num_workers": 2 if is_divided else 1,
        "logging_steps": 1,
        "save_strategy": "'no'",
        "save_steps": "null",
        "evals_per_epoch": "null",
        "eval_steps": 2 if "test_datasets" in recipe else "null",
        "dataset_prepared_path": folder / "prepared",
        "output_dir": folder / "run",
    }
    if recipe["rl"] == "grpo":
        changes |= {"trl.num_generations": 2, "trl.max_completion_length": 8, "trl.steps_per_generation": 4}
    for key, number in (("datasets", 8), ("test_datasets", 4)):
        for index, dataset in enumerate(recipe.get(key, [])):
            file = folder / f"{key}-{index}.jsonl"
            file.write_text("".join(json.dumps(ROWS[dataset["path"]](row)) + "\n" for row in range(1, number + 1)))
            changes |= {f"{key}.{index}.path": file, f"{key}.{index}.name": "null", f"{key}.{index}.split": "train"}
    return [f"{key}={value}" for key, value in changes.items()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_trains(ray_session: Any, bases: dict[Any, str], tmp_path: Path, name: str) -> None:
    cfg = load_config(name, small(name, bases, tmp_path))
    history = run(cfg)
    assert [entry["step"] for entry in history if "grad_norm" in entry] == [1, 2]
    assert all(abs(entry[key]) < 1e4 for entry in history for key in ("loss", "grad_norm") if key in entry)
    assert any(get_strategy(cfg.rl).best_metric in entry for entry in history) == bool(cfg.test_datasets)
    kind = AutoModelForImageTextToText if cfg.base_model in map(bases.get, VISION.values()) else AutoModelForCausalLM
    model = kind.from_pretrained(cfg.base_model if cfg.adapter else tmp_path / "run" / "model")
    if cfg.adapter:
        PeftModel.from_pretrained(model, tmp_path / "run" / "model")


def run(cfg: RunConfig) -> list[dict[str, Any]]:
    """The log of a run: on Ray where the model is divided or rows have pictures; else, which is quicker, in this process."""
    prepared = pipeline.prepare(cfg)
    if cfg.num_workers > 1 or prepared.manifest.get("pictures"):
        return pipeline.train(cfg).history.apply(lambda entry: entry.dropna().to_dict(), axis=1).tolist()
    columns = [*ID_COLUMNS[get_strategy(cfg.rl).batch_kind], ROW_ID]
    splits = ["train", "eval"] if prepared.eval_rows else ["train"]
    rows = TrainDatasetMeta(*(Dataset(prepared.read(split, columns)) for split in splits))
    _, _, trainer = strategies.train(cfg=cfg, dataset_meta=rows)
    return trainer.state.log_history


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("sweep")])
def test_a_sweep_has_trials_that_are_valid(name: str) -> None:
    cfg = load_config(name)
    assert cfg.tune is not None
    trials = check_trials(cfg, corners(cfg.tune))
    assert {trial.rl for trial in trials} == ({"dpo", "ipo", "simpo"} if name == "sweep-strategies" else {"dpo"})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_names_its_sources(name: str) -> None:
    recipe = packaged_recipe(name)
    assert recipe.sources and recipe.hardware
    assert all(re.fullmatch(r"https://\S+|arXiv \d{4}\.\d{5}.*", source) for source in recipe.sources)
    cited = {int(number) for number in re.findall(r"(?<!Source )\[(\d)\]", recipe.text)}
    assert cited == (set(range(1, len(recipe.sources) + 1)) if len(recipe.sources) > 1 else set())


def test_the_command_lists_them() -> None:
    printed = runner.invoke(app, ["recipes"]).stdout
    for name in recipe_names():
        recipe = packaged_recipe(name)
        assert re.search(rf"^{name} +{re.escape(recipe.method)}: {re.escape(recipe.model)}", printed, flags=re.MULTILINE)
        assert all(source in printed for source in recipe.sources)
    assert "dpo, ipo, simpo (sweep): google/gemma-3-1b-it; published for 8 GPUs a run" in printed


def test_the_command_shows_one() -> None:
    file = ROOT / "pipeline" / "recipes" / "simpo.yaml"
    assert runner.invoke(app, ["recipes", "show", "simpo"]).stdout == file.read_text()
    result = runner.invoke(app, ["recipes", "show", "sinpo"])
    assert result.exit_code == 2
    assert result.stderr.startswith("prefray: sinpo: no packaged recipe; there are: dpo-full-fsdp2, dpo-full-zero3, ")


def test_a_name_stands_for_a_file_only_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("simpo", ["rl_beta=2"]).rl_beta == 2
    Path("simpo").write_text("base_model: mine\ndatasets: [{path: pairs.jsonl}]\n")
    assert load_config("simpo").base_model == "mine"
    Path("orpo").mkdir()
    assert load_config("orpo").rl == "orpo"


def test_an_unknown_name_is_answered_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dpo-loar: can't be read: no such file, and no packaged recipe; there are: .*dpo-lora"):
        load_config("dpo-loar")
    for path in ("none.yaml", str(tmp_path / "simpo")):
        with pytest.raises(UserError, match=f"{path}: can't be read: no such file$"):
            load_config(path)


def rows_of_the_page() -> dict[str, list[str]]:
    """Recipe -> the other cells of its row in docs/recipes.md."""
    lines = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", (ROOT / "docs" / "recipes.md").read_text(), flags=re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in lines}


def test_the_page_lists_every_recipe() -> None:
    assert list(rows_of_the_page()) == recipe_names()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_page_says_what_the_recipe_says(name: str) -> None:
    recipe, cfg = packaged_recipe(name), load_config(name)
    model, method, settings, hardware, sources = rows_of_the_page()[name]
    assert (model, method, hardware) == (recipe.model, recipe.method, recipe.hardware)
    assert re.findall(r"\]\((\S+)\)", sources) == recipe.sources
    assert settings == main_settings(cfg)


def main_settings(cfg: RunConfig) -> str:
    """Learning rate, beta, global batch and length, as the page writes them."""
    beta = cfg.orpo_alpha or cfg.rl_beta or (cfg.trl and cfg.trl.beta)
    batch = cfg.micro_batch_size * cfg.gradient_accumulation_steps * cfg.num_workers
    return f"lr {cfg.learning_rate:.0e}, beta {beta:g}, batch {batch}, {cfg.sequence_len} tokens".replace("e-0", "e-")
