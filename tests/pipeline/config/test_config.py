"""Recipes: reading, overriding, dumping, and what loading them imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.config import ClusterKeys
from pipeline.config import RunConfig, dump_config, load_config, parse_config
from pipeline.config.axolotl import NEUTRAL_KEYS, REASONS, RENAMED
from pipeline.config.loading import apply_overrides, parse_yaml
from pipeline.data.keys import DatasetConfig
from pipeline.errors import UserError
from strategies.config import StrategyConfig, as_config
from strategies.config.parsing import FOREIGN_KEYS

ROOT = Path(__file__).parents[3]
RECIPE = "base_model: model\ndatasets:\n  - path: pairs.jsonl\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_every_recipe_in_the_repository_loads() -> None:
    recipes = sorted((ROOT / "pipeline" / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        load_config(path)


def test_overrides(recipe: Path) -> None:
    cfg = load_config(recipe, ["rl_beta=0.2", "ray.num_workers=3", "datasets.0.split=test", "learning_rate=5e-7", "seed=7"])
    assert (cfg.rl_beta, cfg.num_workers, cfg.datasets[0].split, cfg.learning_rate, cfg.seed) == (0.2, 3, "test", 5e-7, 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl_beta", "--set rl_beta: expected key=value"),
        ("datasets.4.path=a", "'4' is no index of a list of 1"),
        ("base_model.x=1", "the key before 'x' holds a value, not a section"),
        ("tokens=[a", "the value is not valid YAML"),
    ],
)
def test_a_wrong_override(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(recipe, [override])


def test_a_number_with_an_exponent_is_a_number_wherever_it_stands(recipe: Path) -> None:
    cfg = load_config(recipe, ["lr_scheduler=cosine_with_min_lr", "lr_scheduler_kwargs={min_lr: 1e-6}", "learning_rate=2e-5"])
    assert (cfg.lr_scheduler_kwargs, cfg.learning_rate) == ({"min_lr": 1e-6}, 2e-5)


def test_overrides_leave_the_original_alone() -> None:
    values = {"a": {"b": 1}, "c": [1, 2]}
    assert apply_overrides(values, ["a.b=2", "c.1=5"]) == {"a": {"b": 2}, "c": [1, 5]}
    assert values == {"a": {"b": 1}, "c": [1, 2]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/a #1", "runs/a #1"),
        ("#1", "#1"),
        ("'a #1'", "a #1"),
        ("[a, b] # c", ["a", "b"]),
        ("3", 3),
        ("a#b", "a#b"),
        ("", None),
    ],
)
def test_a_value_that_is_set_has_no_comment(text: str, value: object) -> None:
    assert apply_overrides({}, [f"a={text}"]) == {"a": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- a", "a recipe is a mapping of keys to values, got list"),
        ("", "a recipe is a mapping of keys to values, got nothing"),
        ("[a]: 1", "not valid YAML"),
        ("a: 1\nb: 2\na: 3", r"key 'a' stands twice \(line 3\)"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_wrong_yaml(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_yaml(text, "recipe.yaml")


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.yaml: can't be read: no such file"):
        load_config(tmp_path / "none.yaml")


def test_the_resolved_config_loads_again(recipe: Path) -> None:
    cfg = load_config(recipe, ["adapter=lora", "val_set_size=4", "eval_steps=2", "ray.num_workers=2"])
    dumped = dump_config(cfg)
    assert parse_config(yaml.safe_load(dumped)) == cfg
    assert "weight_decay: 0.0" in dumped


def test_a_refused_key_is_not_a_known_key() -> None:
    assert REASONS.keys() & RunConfig.model_fields.keys() == {"trust_remote_code"}  # of a dataset
    assert not NEUTRAL_KEYS.keys() & (RunConfig.model_fields.keys() | REASONS.keys())
    assert set(RENAMED.values()) <= RunConfig.model_fields.keys()
    assert len(REASONS) > 200


def test_every_key_is_described() -> None:
    for model in (RunConfig, DatasetConfig, *(ClusterKeys.model_fields[name].annotation for name in ("ray",))):
        for name, field in model.model_fields.items():
            assert field.description, name


def test_a_plain_mapping_for_the_builder_may_hold_a_whole_recipe() -> None:
    others = set(RunConfig.model_fields) - set(StrategyConfig.model_fields)
    assert others - {"deepspeed", "fsdp_config"} == FOREIGN_KEYS
    assert as_config({"base_model": "m", "datasets": [{"path": "a"}], "ray": {"num_workers": 2}}).base_model == "m"


def test_the_builder_knows_only_strategies_that_there_are() -> None:
    with pytest.raises(ValueError, match="rl: unknown strategy 'ppo'; available: dpo"):
        as_config({"base_model": "m", "rl": "ppo"})


def test_loading_a_recipe_imports_neither_torch_nor_ray(recipe: Path) -> None:
    code = (
        "import sys; from pipeline import load_config; import cluster.placement; "
        f"load_config({str(recipe)!r}); print(sorted({{'torch', 'ray', 'transformers', 'trl'}} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
