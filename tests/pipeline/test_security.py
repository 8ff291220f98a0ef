"""What a recipe can't have run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import execution as running
from pipeline.config import load_config, parse_config
from pipeline.config.trust import refuse_code_of_run, refuse_remote_code
from pipeline.errors import ConfigError, UserError

RECIPE = {"base_model": "org/model", "datasets": [{"path": "x.jsonl"}]}


def test_code_of_a_model_is_off_by_default() -> None:
    assert parse_config(RECIPE).trust_remote_code is False
    refuse_remote_code("r.yaml", parse_config(RECIPE), [])


def test_a_submitted_recipe_may_not_ask_for_it_by_itself() -> None:
    asking = parse_config({**RECIPE, "trust_remote_code": True})
    with pytest.raises(UserError, match=r"r\.yaml: trust_remote_code: runs .*org/model.* --set trust_remote_code=true"):
        refuse_remote_code("r.yaml", asking, ["rl_beta=0.1"])
    refuse_remote_code("r.yaml", asking, ["trust_remote_code=true"])
    searched = parse_config({**RECIPE, "tune": {"space": {"trust_remote_code": {"choice": [True, False]}}}})
    with pytest.raises(UserError, match=r"tune\.space\.trust_remote_code: .* remove it from the space"):
        refuse_remote_code("r.yaml", searched, ["trust_remote_code=true"])


def test_it_can_not_be_asked_for_in_another_way() -> None:
    with pytest.raises(ConfigError, match=r"overrides_of_model_kwargs\.trust_remote_code: has a key of its own"):
        parse_config({**RECIPE, "overrides_of_model_kwargs": {"trust_remote_code": True}})
    space = {"overrides_of_model_kwargs.trust_remote_code": {"choice": [True]}}
    with pytest.raises(UserError, match="remove it from the space"):
        refuse_remote_code("r.yaml", parse_config({**RECIPE, "tune": {"space": space}}), ["trust_remote_code=true"])


def test_it_is_refused_in_a_job_whoever_submitted_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    package.mkdir(parents=True)
    for folder in (tmp_path, package):
        (folder / "recipe.yaml").write_text("base_model: m\ndatasets: [{path: x.jsonl}]\ntrust_remote_code: true\n")
    monkeypatch.chdir(tmp_path)
    assert running.load("recipe.yaml", None).trust_remote_code
    monkeypatch.chdir(package)
    with pytest.raises(UserError, match="trust_remote_code: runs Python code"):
        running.load("recipe.yaml", None)
    assert running.load("recipe.yaml", ["trust_remote_code=true"]).trust_remote_code


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system ''", "!include x"])
def test_no_tag_of_yaml_runs_code(tmp_path: Path, tag: str) -> None:
    touched = tmp_path / "touched"
    (tmp_path / "recipe.yaml").write_text(f"base_model: {tag.format(touched)}\ndatasets: [{{path: x.jsonl}}]\n")
    with pytest.raises(UserError, match="not valid YAML: could not determine a constructor for the tag"):
        load_config(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match="the value is not valid YAML"):
        load_config(_valid(tmp_path), [f"base_model={tag.format(touched)}"])
    assert not touched.exists()


def _valid(folder: Path) -> Path:
    (folder / "valid.yaml").write_text("base_model: m\ndatasets: [{path: x.jsonl}]\n")
    return folder / "valid.yaml"


@pytest.mark.parametrize(
    ("saved", "named"),
    [
        ({"plugins": ["somebodys.plugin"]}, "plugins: somebodys.plugin"),
        ({"plugins": "somebodys"}, "plugins: somebodys"),
        ({"attn_implementation": "somebody/kernel"}, "attn_implementation: somebody/kernel"),
        ({"overrides_of_model_kwargs": {"attn_implementation": "a/b"}}, "overrides_of_model_kwargs: attn_implementation"),
        ({"overrides_of_model_config": {"_attn_implementation": "a/b"}}, "overrides_of_model_config: _attn_implementation"),
        ({"overrides_of_model_kwargs": {"weights_only": False}}, "overrides_of_model_kwargs: weights_only"),
        ({"trust_remote_code": True, "base_model": "org/model"}, "trust_remote_code: org/model"),
        ({"trl": {"reward_funcs": ["somebodys.reward", "org/reward-model"]}}, r"trl\.reward_funcs: somebodys\.reward\)"),
    ],
)
def test_a_run_names_code(saved: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"runs/a: its config would run code here \({named}.*; give --trust"):
        refuse_code_of_run("runs/a", saved, rewards=True)
    (key,) = saved.keys() - {"base_model"}
    refuse_code_of_run("runs/a", saved, [f"{'trl.reward_funcs' if key == 'trl' else key}=x"], rewards=True)


def test_what_runs_already_or_is_not_called_is_no_risk() -> None:
    refuse_code_of_run("runs/a", {"base_model": "org/model", "trust_remote_code": False, "plugins": [], "trl": None})
    refuse_code_of_run("runs/a", {"plugins": ["tests.tiny"], "attn_implementation": "sdpa", "trl": "x"}, rewards=True)
    refuse_code_of_run("runs/a", {"trl": {"reward_funcs": ["somebodys.reward"]}})
