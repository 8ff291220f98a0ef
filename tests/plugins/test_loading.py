"""Plugins that can't be loaded, that change, and configs that take theirs along to other processes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import config_class, dump_config, parse_config
from pipeline.errors import ConfigError, UserError
from pipeline.jobs.submission import Submission, plan_job
from pipeline.tuning.space import trial_recipe
from strategies import load_plugins
from strategies.config import as_config
from strategies.losses import PAIR_LOSSES
from strategies.plugins import PluginError
from tests.plugins.conftest import Write

ROOT = Path(__file__).parents[2]
RECIPE: dict[str, Any] = {"base_model": "model", "datasets": [{"path": "pairs.jsonl"}]}
LOSS = """
    from strategies import register_loss

    @register_loss("mine")
    def mine(policy, reference, options):
        return policy.chosen * {factor}
"""
STRATEGY = """
    from strategies import DPOStrategy, Keys, key, register_strategy

    class MyKeys(Keys):
        my_margin: float = key("A margin.", 0.5)

    @register_strategy(keys=MyKeys)
    class Mine(DPOStrategy):
        rl = "mine"
        keys = DPOStrategy.keys | {"my_margin"}
        requires_reference = True
        batch_kind = "pair"
        best_metric = "eval_loss"
"""


def test_a_module_of_the_current_directory(write: Write) -> None:
    write("my_loss", LOSS.format(factor=1))
    cfg = parse_config({**RECIPE, "plugins": ["my_loss"], "dpo_loss_type": "mine"})
    assert cfg.plugins == ["my_loss"]
    assert yaml.safe_load(dump_config(cfg))["plugins"] == ["my_loss"]
    assert as_config({"base_model": "model", "plugins": ["my_loss"], "dpo_loss_type": "mine"}).dpo_loss_type == ["mine"]


def test_one_that_has_changed_is_refused(write: Write) -> None:
    """As between two cells of a notebook, where a mistake can be mended, and the same text may be written again."""
    from tests.plugins.test_registering import logps

    write("my_loss", LOSS.format(factor="["))
    with pytest.raises(PluginError, match=r"my_loss raised SyntaxError: .*my_loss.py, line 6\) when it was imported"):
        load_plugins(["my_loss"])
    for _ in range(2):
        write("my_loss", LOSS.format(factor=30))
        load_plugins(["my_loss"])
        assert PAIR_LOSSES["mine"](logps(), None, None)[0] == -300  # type: ignore[arg-type]
    write("my_loss", LOSS.format(factor=1))
    with pytest.raises(PluginError, match="plugins.0: my_loss has changed since it was imported; restart Python"):
        load_plugins(["my_loss"])


def test_a_sweep_goes_on_with_the_plugin_that_it_began_with(write: Write) -> None:
    write("my_loss", LOSS.format(factor=1))
    space = {"space": {"learning_rate": {"choice": [1e-5, 1e-4]}}}
    cfg = parse_config({**RECIPE, "plugins": ["my_loss"], "dpo_loss_type": "mine", "tune": space})
    write("my_loss", LOSS.format(factor=30))
    assert trial_recipe(cfg, {"learning_rate": 1e-4}, "trial").dpo_loss_type == ["mine"]


def test_a_package_whose_part_is_mended(tmp_path: Path, write: Write) -> None:
    write("my_other", "")  # moves to the folder
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("import my_package.part")
    (package / "part.py").write_text("")
    with pytest.raises(PluginError, match="my_package registers nothing"):
        load_plugins(["my_package"])
    (package / "part.py").write_text(textwrap.dedent(LOSS.format(factor=1)))
    load_plugins(["my_package"])
    assert "mine" in PAIR_LOSSES


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("", "my_nothing", r"my_nothing registers nothing; call strategies.register_loss, .* when it is imported"),
        ("", "my_missing", r"can't import my_missing: No module named 'my_missing'; modules are looked for in /.* and among"),
        ("import my_other", "my_nothing", "can't import my_nothing: No module named 'my_other'"),
        (
            "x = 1 / 0",
            "my_nothing",
            r"my_nothing raised ZeroDivisionError: division by zero \(/.*my_nothing.py:1\) when it",
        ),
        ("raise SystemExit", "my_nothing", r"my_nothing raised SystemExit \(/.*my_nothing.py:1\)"),
        (LOSS.replace("mine", "sigmoid").format(factor=1), "my_nothing", "my_nothing: loss 'sigmoid' is built in; give yours"),
        ("", "my_nothing.py", "expected the name of a module, got the file 'my_nothing.py'; write my_nothing"),
        ("", "my nothing", "expected the dotted name of a module, such as my_plugins, got 'my nothing'"),
        ("", "axolotl.integrations.kd.KDPlugin", "is a plugin of Axolotl's and means nothing here; remove it"),
    ],
)
def test_what_is_wrong_with_a_plugin_comes_with_its_key(write: Write, code: str, name: str, message: str) -> None:
    write("my_nothing", code)
    for _ in range(2):  # not only the first time
        with pytest.raises(ConfigError, match=f"(?s)recipe.yaml: 1 problem\n  plugins.0: .*{message}"):
            parse_config({**RECIPE, "plugins": [name]}, origin="recipe.yaml")


def test_the_error_survives_a_journey() -> None:
    error = pickle.loads(pickle.dumps(PluginError("plugins.0", "can't import my_loss")))
    assert (str(error), error.path) == ("plugins.0: can't import my_loss", "plugins.0")


def test_no_list_of_names() -> None:
    with pytest.raises(ConfigError, match="plugins.0: must be text, got 3"):
        parse_config({**RECIPE, "plugins": [3]})


def test_an_installed_plugin_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[prefray.plugins]\nfirst = my_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="the installed plugin 'first' of the package my-package: can't import my_package: "):
        parse_config(RECIPE)
    (tmp_path / "my_package.py").write_text("from strategies import register_loss\nregister_loss('mine', print)\n")
    assert parse_config({**RECIPE, "dpo_loss_type": "mine"}).dpo_loss_type == ["mine"]


def test_a_config_brings_its_plugins_to_another_process(write: Write, tmp_path: Path) -> None:
    """The class of a config with keys from outside isn't there until its plugins are loaded, from where they were found."""
    write("my_strategy", STRATEGY)
    cfg = parse_config({**RECIPE, "plugins": ["my_strategy"], "rl": "mine", "my_margin": 2})
    (tmp_path / "cfg.pickle").write_bytes(pickle.dumps(cfg))
    again = pickle.loads(pickle.dumps(cfg))
    assert again == cfg and type(again) is type(cfg) is config_class()
    program = f"import pickle; cfg = pickle.load(open('{tmp_path}/cfg.pickle', 'rb')); print(cfg.rl, cfg.my_margin, type(cfg))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", program], cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout == "mine 2.0 <class 'pipeline.config.recipe.RunConfig'>\n"


def test_the_schema_has_the_keys_of_plugins(write: Write) -> None:
    write("my_strategy", STRATEGY)
    load_plugins(["my_strategy"])
    assert config_class().model_json_schema()["properties"]["my_margin"]["default"] == 0.5


def test_a_wrong_plugin_ends_a_command_with_status_2(write: Write, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base_model: m\ndatasets: [{path: p.jsonl}]\nplugins: [my_missing]\n")
    command = [sys.executable, "-m", "pipeline", "train", "recipe.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert "prefray: recipe.yaml: 1 problem\n  plugins.0: can't import my_missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_brings_its_plugins(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read in the job's working directory, and refused when they stay behind."""
    write("my_loss", LOSS.format(factor=1))
    recipe = {**RECIPE, "datasets": [{"path": "rows.jsonl"}], "plugins": ["my_loss"], "dpo_loss_type": "mine"}
    recipe |= {"base_model": "org/model", "output_dir": "/mnt/run", "dataset_prepared_path": "/mnt/prepared"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir("/")
    planned = plan_job(Submission("train", "recipe.yaml", working_dir=tmp_path))
    assert "my_loss.py" in planned.package.files and planned.cfg is not None and planned.cfg.dpo_loss_type == ["mine"]
    (tmp_path / ".gitignore").write_text("my_*.py\n")
    with pytest.raises(
        UserError, match=r"plugins.0: 'my_loss.py' isn't packed: .gitignore, .rayignore or a rule of prefray's leaves it out"
    ):
        plan_job(Submission("train", "recipe.yaml", working_dir=tmp_path))
