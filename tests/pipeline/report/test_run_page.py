"""The page of a run: of a real run, in a real browser; and what it says where parts are missing or broken."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline import TrainResult, write_report
from pipeline.cli import app
from pipeline.errors import UserError
from pipeline.findings.rules import RULES
from pipeline.report.cost import cost_section, worker_hours
from pipeline.report.run import run_page
from pipeline.report.timeline import RunTimeline
from pipeline.runs.folder import RunFolder
from pipeline.ui.console import open_console
from tests.browser import faint, needs_chromium, open_page, undrawn

runner = CliRunner()
CHARTS = (
    "Loss",
    "Reward accuracy",
    "Reward margin",
    "Rewards of chosen and rejected",
    "Log-probabilities of chosen and rejected",
    "Distance from the reference (kl)",
    "Length of completions (tokens)",
    "Learning rate",
    "Gradient norm",
    "Tokens per second",
    "Seconds per step",
    "Length of training rows",
)

DASHES = """() => [...document.querySelectorAll("#metrics .chart")].map((chart) =>
    [...chart.querySelectorAll(".scatterlayer .js-line")].map((line) => getComputedStyle(line).strokeDasharray))"""
"""Of the lines of each chart."""


@pytest.fixture(scope="module")
def run(finished_adapter: TrainResult) -> TrainResult:
    """40 steps of DPO on two workers, with answers at two evaluations to prompts that attack the page."""
    return finished_adapter


@pytest.fixture
def copy(run: TrainResult, tmp_path: Path) -> Path:
    """The folder of the run, brought to another place, to break something in."""
    shutil.copytree(run.run_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*", "model", "report.html"))
    return tmp_path / "copy"


def body(html: str) -> str:
    """A page without plotly."""
    return html[html.index("<body>") :]


@pytest.fixture(scope="module")
def text(run: TrainResult) -> str:
    return body((Path(str(run.run_dir)) / "report.html").read_text(encoding="utf-8"))


@pytest.mark.main_job
def test_a_run_leaves_its_page(run: TrainResult, text: str) -> None:
    assert "<b>finished</b>" in text and "<b>40 of 40</b>" in text
    assert f"<b>{run.metrics['eval_loss']:.4g}</b><span>eval loss (first " in text
    assert f"<b>{int(run.metrics['num_tokens']):,}</b>" in text


@pytest.mark.main_job
def test_findings_come_first(run: TrainResult, text: str) -> None:
    assert text.index('id="findings"') < text.index('id="metrics"')
    stored = json.loads((Path(str(run.run_dir)) / "findings.json").read_text())
    assert [finding.as_json() for finding in run.findings] == stored["findings"] and stored["rules"] == len(RULES)
    (small,) = [finding for finding in run.findings if finding.rule == "evaluation_is_small"]
    assert small.severity == "warning" and small.evidence[0].value == 4
    assert f'<div class="notice warning"><p><b>warning</b> {small.sentence}</p>' in text
    shown = io.StringIO()
    open_console(file=shown).print(run)
    assert shown.getvalue().index(f"warning: {small.sentence}") < shown.getvalue().index("40 steps")


@pytest.mark.main_job
def test_what_a_run_costs(run: TrainResult, text: str) -> None:
    cost = text[text.index('id="cost"') :]
    cost = cost[: cost.index("</section>")]
    assert re.search(r"<dt>pairs/s</dt><dd>[\d.,]+</dd>", cost) and re.search(r"<dt>MFU: .*</dt><dd>[\d.]+%</dd>", cost)
    parts = re.findall(r"<td>(\d+)%</td><td class=\"text[^>]*>(\w+)", cost)
    assert sum(int(share) for share, _ in parts) == pytest.approx(100, abs=4)
    assert {"forward", "backward", "clipping"} <= {name for _, name in parts}
    assert re.search(r"<dt>worker hours</dt><dd>[\d.e-]+</dd>", cost)
    last = run.history.dropna(subset=["loss"]).iloc[-1]
    assert last["pairs_per_second"] * last["seconds/step"] == pytest.approx(8)


def test_a_run_whose_operations_are_not_counted_says_so(tmp_path: Path) -> None:
    """A run of grpo, for example; one of an earlier version has no rates at all."""
    timeline = RunTimeline({"status": "finished", "events": []}, [])
    for name, says in (("fed_tokens_per_second", True), ("tokens_per_second", False)):
        facts = cost_section(RunFolder(tmp_path), [{"step": 1, name: 9.0}], timeline).facts
        assert (
            any(fact.value == "not counted for grpo, for rows with pictures, nor for models with experts" for fact in facts)
            is says
        )


def test_hours_are_those_of_all_workers_and_attempts() -> None:
    """Two workers for an hour, then one for half an hour, whose driver was killed."""
    two, one = {"a": [0], "b": [1]}, {"a": [0]}
    training = {"event": "training", "step": 0, "repeated": 0, "setup": {}, "notes": []}
    events = [
        {"event": "began", "time": 0.0, "host": "h", "workers": {}, "sharding": None},
        {**training, "time": 100.0, "nodes": two},
        {"event": "failure", "time": 3700.0, "step": 3, "workers": [], "restart": 1},
        {**training, "time": 4000.0, "nodes": one},
    ]
    records = [{"step": 9, "time": 5800.0}]
    assert worker_hours(RunTimeline({"status": "started", "events": events}, records), records) == pytest.approx(2.5)


@pytest.mark.main_job
def test_what_a_run_had(run: TrainResult, text: str) -> None:
    assert "2 workers of 1 CPU" in text and "weights in float32, products in float32" in text
    assert "8 = 2 (micro batch) x 2 (accumulation) x 2 (workers)" in text
    assert re.search(r"packed rows, [\d,]+ tokens an epoch; padded batches of 2 pairs hold [\d,]+, \d\.\d times as many", text)
    assert "none: every worker holds the whole model" in text
    events = json.loads((Path(str(run.run_dir)) / "run.json").read_text())["events"]
    assert [event["event"] for event in events] == ["began", "training", "ended"]
    assert list(events[1]["nodes"].values()) == [[0, 1]]
    assert (events[2]["how"], events[2]["step"]) == ("finished", 40)
    assert f"training with 2 workers on {next(iter(events[1]['nodes']))} (2)" in text


@pytest.mark.main_job
def test_why_rows_were_rejected(text: str) -> None:
    assert "6 rows couldn&#39;t be used" in text
    table = text[text.index('id="rejected"') :]
    rows = re.findall(r"<td>(\d+)</td><td class=\"text[^>]*>(.*?)</td>", table[: table.index("</section>")])
    assert rows == [
        ("3", "chosen and rejected are the same"),
        ("2", "no column &#39;chosen&#39; (the row has prompt, rejected, mark)"),
        ("1", "&#39;chosen&#39; must be text, got list"),
    ]
    assert "32 rows to train on and 4 to evaluate on" in text


@pytest.mark.main_job
def test_text_of_data_is_only_text(text: str) -> None:
    assert "<script>document.title" not in text and "<img" not in text
    assert "&lt;script&gt;document.title = &#39;taken&#39;" in text and "{{ 7 * 7 }}" in text
    assert "\u0007" not in text and "a bell \ufffd and" in text


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_the_page_in_a_browser(run: TrainResult, width: int, scheme: str) -> None:
    with open_page(Path(str(run.run_dir)) / "report.html", width, scheme) as (page, said):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert undrawn(page) == []
        titles = page.locator(".chart .gtitle").all_text_contents()
        assert [title for title in CHARTS if title not in titles] == []
        assert faint(page) == []
        dashes = page.evaluate(DASHES)
        assert max(map(len, dashes)) == 5 and all(len(set(lines)) == len(lines) for lines in dashes)
        page.emulate_media(color_scheme="dark" if scheme == "light" else "light")  # a person changes it while looking
        assert faint(page) == []
        page.locator("summary").nth(0).click()
        assert undrawn(page) == []
        page.locator("summary").nth(1).click()
        assert "learning_rate: 0.001" in page.locator("#config pre").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.title().startswith("Run in ") and page.locator("img").count() == 0
        answers = page.locator("#answers .sample").nth(0)
        assert answers.locator("h3").all_inner_texts() == ["prompt", "reference", "policy, step 20", "policy, step 40"]
        assert said == []


@pytest.mark.main_job
def test_the_command_writes_it_again(copy: Path, tmp_path: Path) -> None:
    done = runner.invoke(app, ["report", str(copy)])
    assert (done.exit_code, done.stdout) == (0, f"{copy}/report.html\n")
    assert f"Run in {copy}" in (copy / "report.html").read_text()
    done = runner.invoke(app, ["report", str(copy), "--output", str(tmp_path / "page.html")])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path}/page.html\n")


@pytest.mark.main_job
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", '{"status": "fin', r"run.json is broken: .*; put a whole one there"),
        ("run.json", "[]", r"run.json is broken: it says no status"),
        ("run.json", '{"status": "started", "events": [{"event": "ended", "time": 1}]}', "it holds events that aren't a run's"),
        ("run.json", '{"status": "started", "events": {}}', "it holds events that aren't a run's"),
        ("config.yaml", None, r"holds a part of a run: config.yaml is missing; put it back"),
        ("config.yaml", "base_model: [", r"config.yaml: not valid YAML"),
        ("config.yaml", "base_model: m\nlearning_rat: 1", r"learning_rat: unknown key"),
        (
            "metrics.jsonl",
            '{"step": 1}\n{"loss"\n{"step": 2}\n',
            r"metrics.jsonl: line 2 is no record of a step, but '{.*'; delete that line",
        ),
        ("metrics.jsonl", '{"loss": 1}\n', r"metrics.jsonl: line 1 is no record of a step"),
    ],
)
def test_what_is_broken_is_said(copy: Path, name: str, content: str | None, message: str) -> None:
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(content)
    with pytest.raises(UserError, match=message):
        write_report(copy)
    done = runner.invoke(app, ["report", str(copy)])
    assert done.exit_code == 2 and "Traceback" not in done.stderr
    assert not (copy / "report.html").exists()


def test_where_there_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, message in (
        ("nowhere", "nowhere' is not there, or empty; give the output_dir of a run or a sweep"),
        ("file", "file' is a file; give the output_dir of a run or a sweep"),
        ("", "holds no run and no sweep; give the output_dir of a run or a sweep"),
    ):
        with pytest.raises(UserError, match=message):
            write_report(tmp_path / name)
    with pytest.raises(UserError, match="holds no run: run.json is missing; give the output_dir of one"):
        run_page(RunFolder(tmp_path / "nowhere"))


@pytest.mark.main_job
def test_where_the_page_cannot_go(copy: Path, tmp_path: Path) -> None:
    for output, message in (
        (tmp_path / "none" / "page.html", "can't be written: No such file or directory; give another file"),
        (tmp_path, f"--output: '{tmp_path}' is a folder; give a file, such as '{tmp_path}/report.html'"),
        ("s3://bucket/page.html", "--output: must be a file on this machine, got the URI 's3://bucket/page.html'"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            write_report(copy, output)
    (copy / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report.html' is a folder; remove it, or give a file with --output"):
        write_report(copy)
    assert not list(copy.glob(".report*"))


@pytest.mark.main_job
def test_data_that_are_gone(copy: Path, run: TrainResult) -> None:
    state = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**state, "prepared": "gone"}))
    page = body(run_page(RunFolder(copy)))
    assert "/prepared/gone here: they were deleted, or are on another machine." in page
    assert "packed rows</dd>" in page and "Length of training rows" not in page and "Reward margin" in page


@pytest.mark.main_job
def test_data_that_are_broken(copy: Path, tmp_path: Path) -> None:
    config = (copy / "config.yaml").read_text()
    fingerprint = json.loads((copy / "run.json").read_text())["prepared"]
    (copy / "config.yaml").write_text(re.sub("dataset_prepared_path: .*", f"dataset_prepared_path: {tmp_path}", config))
    (tmp_path / fingerprint).mkdir()
    for manifest in ("{", "{}", '{"fingerprint": "x", "files": [], "sources": [], "kind": "pair"}'):
        (tmp_path / fingerprint / "manifest.json").write_text(manifest)
        assert re.search(r"The prepared data in \S+ can&#39;t be read: ", body(run_page(RunFolder(copy)))), manifest


@pytest.mark.main_job
def test_a_run_that_has_only_begun(copy: Path) -> None:
    shutil.rmtree(copy / "generations")
    (copy / "metrics.jsonl").unlink()
    (copy / "run.json").write_text('{"status": "opened"}')
    page = body(run_page(RunFolder(copy)))
    assert "<b>not finished</b>" in page and "<b>0</b>" in page
    assert "No step was logged." in page and "No data had been prepared when the run ended." in page
    assert "This run has no record of what happened to it" in page


@pytest.mark.main_job
def test_answers_that_cannot_be_read(copy: Path) -> None:
    (copy / "generations" / "step-000040.jsonl").write_text('{"prompt"')
    assert "generations/ can&#39;t be read: " in body(run_page(RunFolder(copy)))
    (copy / "generations" / "step-000040.jsonl").write_text('{"prompt": "x"}\n')
    assert "step-000040.jsonl holds rows without prompt and policy" in body(run_page(RunFolder(copy)))


@pytest.mark.main_job
def test_answers_of_a_longer_attempt_are_left_out(copy: Path) -> None:
    rows = (copy / "generations" / "step-000040.jsonl").read_text()
    (copy / "generations" / "step-000400.jsonl").write_text(rows)
    assert "step 400" not in body(run_page(RunFolder(copy)))


@pytest.mark.main_job
def test_a_reference_that_follows_the_policy_is_shown_twice(copy: Path) -> None:
    for step in (20, 40):
        row = {"prompt": "p", "policy": f"mine {step}", "reference": f"its {step}"}
        (copy / "generations" / f"step-{step:06d}.jsonl").write_text(json.dumps(row) + "\n")
    page = body(run_page(RunFolder(copy)))
    labels = [f"{who}, step {step}" for who in ("reference", "policy") for step in (20, 40)]
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["prompt", *labels]


BEGAN = {"event": "began", "host": "head", "workers": {"number": 2, "least": 1, "resources": {"CPU": 2.0}}, "sharding": None}
SETUP = {"device": "CPU", "weights": "float32", "products": "float32", "packed": True}


def training(time: float, step: int, nodes: dict[str, list[int]], repeated: int | None = 0) -> dict[str, Any]:
    return {"event": "training", "time": time, "step": step, "nodes": nodes, "repeated": repeated, "setup": SETUP, "notes": []}


def test_the_story_of_a_run_that_was_hit() -> None:
    """A node dies, another comes, the driver is killed, the next one is stopped."""
    died = [{"rank": 1, "node": "b", "what": "died", "why": "its node is gone"}]
    events = [
        {**BEGAN, "time": 0.0},
        training(10.0, 0, {"a": [0], "b": [1]}),
        {"event": "failure", "time": 50.0, "step": 7, "workers": died, "restart": 1},
        training(60.0, 4, {"a": [0]}, repeated=3),
        training(90.0, 8, {"a": [0], "c": [1]}),
        {**BEGAN, "time": 1000.0},
        training(1010.0, 8, {"a": [0]}, repeated=None),
        {"event": "ended", "time": 1020.0, "step": 9, "how": "stopped", "why": "stopped by SIGTERM"},
    ]
    story = RunTimeline({"status": "started", "events": events}, [{"step": 8, "time": 100.0}, {"step": 9, "time": 1015.0}])
    assert (story.status, story.restarts, story.marks, story.seconds) == ("stopped", 1, [4, 8], 100.0 + 20.0)
    table = story.section().table
    assert table is not None
    assert [row.cells[2] for row in table.rows] == [
        "started on head, with 1 to 2 workers of 2 CPU",
        "training with 2 workers on a (1), b (1)",
        "worker 1 on b died: its node is gone",
        "restart 1 (ray.max_failures)",
        "training with 1 worker on a (1) (before: 2); 3 steps repeated",
        "training with 2 workers on a (1), c (1) (before: 1)",
        "continued on head, with 1 to 2 workers of 2 CPU",
        "training with 1 worker on a (1)",
        "stopped: stopped by SIGTERM",
    ]


def test_a_run_whose_end_nobody_has_recorded() -> None:
    story = RunTimeline({"status": "started", "events": [{**BEGAN, "time": 5.0}]}, [{"step": 1, "time": 30.0}])
    assert (story.status, story.seconds) == ("not finished", 25.0)
    assert "it goes on, or its driver was killed" in story.section().words


@pytest.mark.main_job
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(copy: Path) -> None:
    copy.chmod(0o500)
    with pytest.raises(UserError, match=r"can't be written: Permission denied; give a file with --output"):
        write_report(copy)
