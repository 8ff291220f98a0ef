"""What `inspect` finds in data with planted faults, and what it leaves on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipeline import Inspection, inspect, write_inspection
from pipeline.cli import app
from pipeline.config import dump_config
from pipeline.errors import UserError
from pipeline.inspection.measures import ches
from pipeline.inspection.rules import find_all
from pipeline.inspection.strangest import strangest
from pipeline.ray.tasks import run_here
from tests.browser import faint, needs_chromium, open_page, undrawn
from tests.pipeline.inspection.conftest import prepared_of, recipe_of, scored
from tests.runs import HOSTILE
from tests.tiny import pairs, tiny_model, tiny_tokenizer
from tests.tiny_vision import picture, save_vision

HIDDEN = {"ray": {"score": {"hidden_states": True}}}
NEVER = "the quick brown fox jumps over the lazy dog near the quiet river bank"


def planted() -> list[dict[str, str]]:
    """40 pairs, of which two are equal; one text of a benchmark, one that is cut, one that attacks a page, one empty answer."""
    rows = pairs(36)
    rows.append({**rows[3]})
    rows.append({"prompt": f"Complete: {NEVER} ", "chosen": "yes", "rejected": "no"})
    rows.append({"prompt": HOSTILE, "chosen": "x" * 300, "rejected": "short"})
    rows.append({"prompt": "Say nothing. ", "chosen": "", "rejected": "something"})
    return rows


@pytest.fixture
def cfg(recipe: Any, tmp_path: Path) -> Any:
    tests = tmp_path / "tests.jsonl"
    tests.write_text("".join(json.dumps(row) + "\n" for row in [pairs(1)[0], {**pairs(60)[59], "prompt": "Another? "}]))
    keys = {"test_datasets": [{"path": str(tests)}], "excess_length_strategy": "truncate", "max_rejected_fraction": 0.5}
    return recipe(planted(), **keys, **HIDDEN)


def look(cfg: Any, **keys: Any) -> Inspection:
    return inspect(cfg, executor=run_here, **keys)


def rules(found: Inspection) -> dict[str, Any]:
    return {finding.rule: finding for finding in found.findings}


def test_faults_are_found_and_the_columns_are_those_of_the_rows(cfg: Any, tmp_path: Path) -> None:
    (tmp_path / "bench.txt").write_text(NEVER.upper())
    prepared = prepared_of(cfg)
    scores = scored(cfg, prepared, tiny_model(tiny_tokenizer()))
    found = look(cfg, against=[str(tmp_path / "bench.txt")])
    by_rule = rules(found)
    assert {"same_prompts", "near_duplicates", "benchmark_overlap", "no_end", "reference_ranks"} <= set(by_rule)
    assert "hard_pairs" in by_rule and not found.missing
    assert by_rule["same_prompts"].sentence.startswith("The prompt of 1 of 2 evaluation rows is")
    assert by_rule["near_duplicates"].rows == ("36",) and by_rule["benchmark_overlap"].rows == ("37",)
    assert by_rule["no_end"].rows == ("38",)
    table = found.table.set_index("row_id")
    assert table.loc[[3, 36], "near_duplicates"].tolist() == [1, 1] and table.loc[36, "duplicate_of"] == 3
    assert table.loc[0, "prompt_rows"] == 2 and table.loc[0, "prompt_in_both"]
    rows = prepared.read().to_pylist()
    for row, logps in zip(rows, scores.read().to_pylist(), strict=True):
        one = table.loc[row["row_id"]]
        chosen, rejected = (np.array(logps[f"ref_{side}_logps"]) for side in ("chosen", "rejected"))
        assert one["reference_margin"] == pytest.approx(chosen.sum() - rejected.sum(), rel=1e-4, abs=1e-4)
        assert one["score_gap"] == pytest.approx(chosen.mean() - rejected.mean(), rel=1e-4, abs=1e-5)
        assert one["length_ratio"] == pytest.approx(len(row["chosen_ids"]) / len(row["rejected_ids"]))


def chat(number: int) -> list[dict[str, Any]]:
    """Conversations with a system prompt, each about a text of its own."""
    system = {"role": "system", "content": "You are a helpful assistant who answers all that users may ask you with care"}
    rows = []
    for row in range(number):
        question = {"role": "user", "content": f"{NEVER} {row}"}
        answers = {side: [{"role": "assistant", "content": f"{side} {row}"}] for side in ("chosen", "rejected")}
        rows.append({"prompt": [system, question], **answers})
    return rows


def test_messages_of_chats_end_and_are_compared_with_benchmarks_alone(recipe: Any, tmp_path: Path) -> None:
    """ChatML writes a line break after its end token, and a system prompt has more words than a question."""
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": NEVER}))
    found = look(recipe(chat(4)), against=[str(tmp_path / "bench.jsonl")])
    assert found.prepared.read("train", ["chosen"])["chosen"].to_pylist()[0].endswith("<|im_end|>\n")
    assert "no_end" not in rules(found) and not found.table["answers_without_end"].any()
    assert rules(found)["benchmark_overlap"].severity == "warning" and (found.table["benchmark_overlap"] > 0.5).all()


def test_the_same_question_about_another_picture_is_another_row(tmp_path: Path) -> None:
    rows = []
    for row, color in enumerate(("red", "blue", "red")):
        picture(color, "circle").save(tmp_path / f"{row}.png")
        answers = {side: [{"role": "assistant", "content": f"{side} it is"}] for side in ("chosen", "rejected")}
        content = [{"type": "image"}, {"type": "text", "text": "Which colour is it?"}]
        rows.append({"images": [str(tmp_path / f"{row}.png")], "prompt": [{"role": "user", "content": content}], **answers})
    found = look(recipe_of(save_vision(tmp_path / "base", "llava"), tmp_path, rows))
    assert found.table["prompt_rows"].tolist() == [2, 1, 2]
    assert found.table["near_duplicates"].tolist() == [1, 0, 1] and found.table["duplicate_of"].tolist() == [-1, -1, 0]


def test_columns_are_complete_or_absent_and_computed_once(cfg: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepared_of(cfg)
    found = look(cfg)
    files = [file for columns in found.columns for file in sorted(columns.path.rglob("*.parquet"))]
    bytes_of = {file: file.read_bytes() for file in files}
    assert len(files) == 2 * 2
    assert not any("staging" in str(path) for path in found.columns[1].path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.inspection.columns.executor_for", None)
        assert inspect(cfg).table.equals(found.table)
    # A killed process leaves no manifest; a changed file isn't what the manifest says.
    (found.columns[0].path / "manifest.json").unlink()
    files[-1].write_bytes(b"changed")
    assert look(cfg).table.equals(found.table)
    assert {file: file.read_bytes() for file in files} == bytes_of
    assert found.scores is None and "prefray score RECIPE" in found.missing[0]
    assert prepared.fingerprint == found.prepared.fingerprint


def test_labelled_rows_are_looked_at_and_prompts_alone_refused(recipe: Any, tmp_path: Path) -> None:
    datasets = [{"path": str(tmp_path / "rows.jsonl"), "split_pairs": True}]
    found = look(recipe(planted()[:-1], rl="kto", datasets=datasets, micro_batch_size=4))
    assert {"completion_length", "near_duplicates"} <= {*found.table.columns} and "chosen_length" not in found.table
    assert "no reference" in found.missing[0] or "keeps its reference in memory" in found.missing[0]
    grpo = recipe(planted(), rl="grpo", trl={"reward_funcs": ["tests.reward_functions.length"]}, micro_batch_size=8)
    with pytest.raises(UserError, match="rl: grpo: its rows are prompts alone"):
        look(grpo)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "can't be read: No such file or directory"),
        ("few.txt", "only five words are here", "has no text of 8 words or more"),
        ("bad.jsonl", '{"question": "one two"}\n{"question": \n', "--against: .*bad.jsonl"),
        (
            "rows.bak",
            "{}",
            r"--against: .*rows.bak: its name doesn't tell its format; give a file that ends in one of \.txt, \.md, ",
        ),
        ("empty.jsonl", "", "--against: .*empty.jsonl: '.*empty.jsonl' is empty"),
        ("latin.txt", "é".encode("latin-1") * 20, "can't be read: .*utf-8"),
    ],
)
def test_benchmarks_that_cannot_be_read_are_refused(cfg: Any, tmp_path: Path, name: str, content: Any, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        look(cfg, against=[str(tmp_path / name)])


def test_the_command_prints_findings_or_json_and_writes_the_page(cfg: Any, tmp_path: Path) -> None:
    prepared_of(cfg)
    (tmp_path / "recipe.yaml").write_text(dump_config(cfg))
    shown = CliRunner().invoke(
        app, ["inspect", str(tmp_path / "recipe.yaml"), "--json", "--output", str(tmp_path / "page.html")]
    )
    assert shown.exit_code == 0, shown.output
    printed = json.loads(shown.stdout)
    assert {finding["rule"] for finding in printed["findings"]} >= {"same_prompts", "no_end"}
    assert printed["columns"]["length_ratio"]["median"] > 0 and printed["scores"] is None
    assert (tmp_path / "page.html").exists()
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "recipe.yaml")])
    assert "warning: The prompt of 1 of 2 evaluation rows" in shown.output and "not looked at: " in shown.output
    assert "inspect.html" in shown.output and "length_ratio" in shown.output


def test_an_inspection_is_drawn_in_notebooks_too(cfg: Any) -> None:
    found = look(cfg)
    console = Console(width=100, record=True)
    console.print(found)
    assert "columns of every row" in console.export_text() and "columns of every row" in found._repr_html_()


@needs_chromium
def test_the_page_in_a_browser(cfg: Any, tmp_path: Path) -> None:
    prepared = prepared_of(cfg)
    scored(cfg, prepared, tiny_model(tiny_tokenizer()))
    page = write_inspection(look(cfg), cfg, tmp_path / "inspect.html")
    for width, scheme in ((1280, "light"), (390, "dark")):
        with open_page(page, width, scheme) as (tab, said):
            assert tab.title() == "Inspection of prepared data"
            tab.evaluate("document.querySelectorAll('details').forEach((part) => part.open = true)")
            assert undrawn(tab) == [] and faint(tab) == []
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            text = tab.inner_text("main")
            assert "<script>document.title" in text and "<|im_end|>" in text
            assert said == []
            assert "Findings" in text and "score_gap" in text and "Shortest rows" in text


def test_length_and_a_first_token_that_tell_chosen_from_rejected_are_reported() -> None:
    rows, rng = 200, np.random.default_rng(0)
    lengths = {"chosen_length": rng.integers(50, 150, rows), "rejected_length": rng.integers(20, 120, rows)}
    tokens = {"chosen_first_token": [7] * 150 + [*range(50, 100)], "rejected_first_token": [7] * 20 + [*range(100, 280)]}
    table = pd.DataFrame({"row_id": range(rows), "prompt_length": 9, "length_ratio": 1.0, **lengths, **tokens})
    found = {finding.rule: finding.sentence for finding in find_all(table)}
    assert set(found) == {"length_bias", "telling_first_token"}
    assert "the longer one in" in found["length_bias"]
    assert "75% of chosen answers and 10% of rejected ones" in found["telling_first_token"]
    fair = table.assign(
        rejected_length=table["chosen_length"].to_numpy()[::-1], rejected_first_token=tokens["chosen_first_token"]
    )
    assert find_all(fair) == ()


def test_rows_that_are_as_others_are_not_shown_as_strange() -> None:
    """Such as a chosen answer that is the shorter one, among those that are much longer."""
    columns = {"length_ratio": [0.5, 0.9, 1.0, 1.5], "first_token_share": [0.5, 0.5, 0.5, 0.01], "tokens": [4, 5, 6, 7]}
    kinds = {kind.name: kind.rows.index.tolist() for kind in strangest(pd.DataFrame(columns))}
    assert kinds["longer"] == [3] and kinds["shorter"] == [0, 1] and kinds["beginnings"] == [3]
    alike = pd.DataFrame({"length_ratio": [1.0, 1.0], "first_token_share": [0.5, 0.5], "tokens": [4, 4]})
    assert {kind.name for kind in strangest(alike)} == {"shortest", "longest"}


def test_ches_is_high_where_answers_are_alike() -> None:
    states = np.array([[1.0, 0.0], [2.0, 0.0]])
    # <chosen, rejected> - |chosen|^2
    assert ches(states, np.array([[1.0, 5.0], [0.0, 3.0]])).tolist() == [0.0, -4.0]
