"""What a recipe can't have run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli import running
from pipeline.config import load_config, parse_config
from pipeline.errors import ConfigError, UserError
from pipeline.security import refuse_remote_code

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
