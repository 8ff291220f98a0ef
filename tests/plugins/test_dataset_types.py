"""Dataset types from outside: what names prepared data, and what a failure says."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import register_dataset_type
from pipeline.data.job import Job
from pipeline.data.plan import make_plan
from pipeline.data.process_shard import stage_shard
from pipeline.data.transforms import load_transform, pair_text
from pipeline.errors import UserError
from pipeline.io.storage import Folder
from strategies.plugins import Plugins, load_plugins
from tests.pipeline.data.conftest import make_config, write_jsonl
from tests.plugins.conftest import Write
from tests.tiny import pairs, tiny_tokenizer

TYPE = """
    from pipeline import register_dataset_type
    from pipeline.data.transforms import RowError, pair_text

    @register_dataset_type("mine"{version})
    def mine(context):
        def render(row):
            {code}
            return pair_text(row["prompt"], row["chosen"], row["rejected"])
        return render
"""


def stage(folder: Path, rows: list[Any]) -> list[dict[str, Any]]:
    """The work of a task, in this process."""
    config = make_config(folder, {"path": str(write_jsonl(folder / "rows.jsonl", rows)), "type": "mine"})
    plan = make_plan(config, tiny_tokenizer(), 2000)
    plugins = Plugins(("my_type",), (str(folder),))
    settings = (2048, "drop", 2000, Folder(folder), plugins)
    job = Job("dpo", tiny_tokenizer(), plan.datasets, plan.templates, plan.shards, *settings)
    return list(stage_shard(job, plan.shards[0]))


@pytest.mark.parametrize(("version", "changes"), [("", True), (", version='1'", False)])
def test_a_change_of_its_code_is_other_data_unless_its_version_says_otherwise(
    write: Write, tmp_path: Path, version: str, changes: bool
) -> None:
    config = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "rows.jsonl", pairs(3))), "type": "mine"})
    found = []
    for number, code in enumerate(("pass", "row = {**row, 'prompt': 'Q'}", "pass")):
        path = write("my_type", TYPE.format(version=version, code=code))
        os.utime(path, (number, number))
        sys.modules.pop("my_type", None)  # as in a new process
        load_plugins(["my_type"])
        found.append(make_plan(config, tiny_tokenizer(), 2000).fingerprint)
    assert found[0] == found[2]
    assert (found[0] != found[1]) == changes


def test_another_version_is_other_data(tmp_path: Path, write: Write) -> None:
    config = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "rows.jsonl", pairs(3))), "type": "mine"})
    found = set()
    for version in ("1", "2"):
        path = write("my_type", TYPE.format(version=f", version={version!r}", code="pass"))
        os.utime(path, (int(version), int(version)))
        sys.modules.pop("my_type", None)  # as in a new process
        load_plugins(["my_type"])
        found.add(make_plan(config, tiny_tokenizer(), 2000).fingerprint)
    assert len(found) == 2


def test_rows_that_it_refuses_are_counted(write: Write, tmp_path: Path) -> None:
    write("my_type", TYPE.format(version="", code="if row['prompt'] == 'bad': raise RowError('it is bad')"))
    load_plugins(["my_type"])
    (summary,) = stage(tmp_path, [*pairs(2), {"prompt": "bad", "chosen": "a", "rejected": "b"}])
    assert (summary["rows"], summary["rejected"]) == (2, 1)
    assert summary["first_bad"] == [{"source": str(tmp_path / "rows.jsonl"), "row_number": 3, "reason": "it is bad"}]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("row['no']", r"raised KeyError: 'no' \(/.*my_type.py:8\)"),
        (
            "return row['prompt'] if row['prompt'] == 'odd' else pair_text('a', 'b', 'c')",
            "must return a Rendered, .* got str",
        ),
    ],
)
def test_a_failure_names_the_type_the_row_and_the_line(write: Write, tmp_path: Path, code: str, message: str) -> None:
    write("my_type", TYPE.format(version="", code=code if "odd" in code else f"row['prompt'] != 'odd' or {code}"))
    load_plugins(["my_type"])
    rows = [*pairs(2), {"prompt": "odd", "chosen": "a", "rejected": "b"}]
    with pytest.raises(UserError, match=f"^row 3 of {tmp_path}/rows.jsonl: type: dataset type 'mine' {message}"):
        stage(tmp_path, rows)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda context: 1 / 0, r"type: dataset type 'mine' raised ZeroDivisionError: .*test_dataset_types.py:\d+\)"),
        (lambda context: None, "type: dataset type 'mine' must return a function of a row, got NoneType"),
    ],
)
def test_a_factory_that_fails(factory: Any, message: str) -> None:
    register_dataset_type("mine", factory)
    with pytest.raises(UserError, match=message):
        load_transform("mine")


def test_rows_of_another_kind() -> None:
    register_dataset_type("mine", lambda context: lambda row: pair_text("a", "b", "c"), kind="unpaired")
    with pytest.raises(UserError, match="must return rows of kind 'unpaired', got 2 sequences and label None"):
        load_transform("mine", rl="kto")({})


def test_a_function_of_no_file(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec("def mine(context):\n    return lambda row: None\n", names)
    register_dataset_type("mine", names["mine"])
    config = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "rows.jsonl", pairs(3))), "type": "mine"})
    with pytest.raises(
        UserError, match=r"datasets\[0\].type: 'mine' is defined by no file that workers could import; write it"
    ):
        make_plan(config, tiny_tokenizer(), 2000)
