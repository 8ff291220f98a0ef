"""`prefray evaluate` and `prefray generate` as a person runs them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline import generate
from pipeline.cli import app
from pipeline.errors import UserError
from pipeline.evaluation.generate_on_ray import SamplingOptions
from tests.tiny import tiny_gpt2, tiny_tokenizer

runner = CliRunner()


@pytest.fixture(autouse=True)
def _handlers_of_an_earlier_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's log handlers keep the stream of the first command that the runner ran, which is closed by now."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


def test_evaluate_prints_a_table_and_writes_json(adapter_run: Any, tmp_path: Path) -> None:
    command = ["evaluate", str(adapter_run.run_dir), "--answers", "3", "--max-new-tokens", "4", "--temperature", "0"]
    done = runner.invoke(app, [*command, "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    for words in ("rewards/accuracies", "95% interval", "by source", "answers/length", "don't estimate it"):
        assert words in done.stdout, words
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["metrics"]["answers/length"]["n"] == 3 and "answers/kl" not in written["metrics"]


def test_json_alone(adapter_run: Any) -> None:
    done = runner.invoke(app, ["evaluate", str(adapter_run.run_dir), "--answers", "0", "--json", "-"])
    assert json.loads(done.stdout)["metrics"]["rewards/margins"]["n"] == 16


@pytest.mark.main_job
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--answers", "-1"], "--answers: must be 0 or more, got -1"),
        (["--confidence", "95"], "--confidence: must be between 0 and 1, such as 0.95, got 95"),
        (["--temperature", "nan"], "--temperature: must be 0"),
        (["--type", "chatml.intel"], "--type: is of --data, and there is none"),
        (["--json", "nowhere/found.json"], "--json: 'nowhere/found.json' can't be written"),
        (["--top-p", "0"], "--top-p: must be above 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: must be at least 1"),
        (["--reward", "tests.reward_functions.lenght"], "has no function 'lenght'; did you mean length"),
        (["--reward", "tests.reward_functions.length", "--answers", "0"], "--reward: judges answers, and --answers is 0"),
        (["--data", "nothing.jsonl"], "no such file or folder: 'nothing.jsonl'"),
        (["--set", "learning_rat=1"], "did you mean 'learning_rate'"),
    ],
)
def test_a_wrong_option_is_one_message(finished_adapter: Any, options: list[str], message: str) -> None:
    done = runner.invoke(app, ["evaluate", str(finished_adapter.run_dir), *options])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.output


@pytest.mark.main_job
def test_prompts_can_t_give_an_accuracy(finished_adapter: Any, tmp_path: Path, tiny_base: str) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n' * 3)
    done = runner.invoke(app, ["evaluate", str(finished_adapter.run_dir), "--data", str(tmp_path / "prompts.jsonl")])
    assert done.exit_code == 2 and "chosen" in done.stderr
    done = runner.invoke(app, ["evaluate", tiny_base])
    assert done.exit_code == 2 and "is no run, so it has no evaluation rows; give pairs" in done.stderr


def test_generate_shows_both_answers(adapter_run: Any, tmp_path: Path) -> None:
    command = ["generate", str(adapter_run.run_dir), "--max-new-tokens", "6"]
    done = runner.invoke(app, [*command, "Why is it so?", "How?", "--json", str(tmp_path / "answers.json")])
    assert done.exit_code == 0, done.output
    answers = json.loads((tmp_path / "answers.json").read_text())["answers"]
    assert [row["prompt"] for row in answers] == ["Why is it so?", "How?"]
    assert all(row["policy_length"] <= 6 and "reference" in row for row in answers)
    (tmp_path / "prompts.txt").write_text("Why is it so?\nHow?\n")
    again = runner.invoke(app, [*command, "--file", str(tmp_path / "prompts.txt"), "--json", "-"])
    assert json.loads(again.stdout)["answers"] == answers
    piped = runner.invoke(app, [*command, "--json", "-"], input="Why is it so?\nHow?\n")
    assert json.loads(piped.stdout)["answers"] == answers


@pytest.mark.main_job
def test_generate_says_what_is_wrong(finished_adapter: Any, tmp_path: Path) -> None:
    run = str(finished_adapter.run_dir)
    (tmp_path / "p.jsonl").write_text('{"question": "Why?"}\n')
    for arguments, message in (
        ([run, "--file", str(tmp_path / "p.jsonl")], "line 1: expected text, a list of messages"),
        ([run, "Why?", "--file", "x.txt"], "--file: prompts were given as arguments too"),
        ([run], "no prompts to answer"),
        ([str(tmp_path), "Why?"], "is no run, model or adapter"),
    ):
        done = runner.invoke(app, ["generate", *arguments], input="")
        assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.output


def test_answers_without_an_adapter_are_the_bases(adapter_run: Any, tiny_base: str) -> None:
    """Greedy answers, alone and in a batch with longer prompts, are those of `generate` on the model itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = SamplingOptions(max_new_tokens=8, temperature=0)
    found = generate(str(adapter_run.run_dir), ["Why?", "A much longer prompt than the other."], options=options)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_base), AutoModelForCausalLM.from_pretrained(tiny_base)
    for row in found.rows:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert row["reference"] == tokenizer.decode(answer, skip_special_tokens=True)
    assert "<script>" not in generate(str(adapter_run.run_dir), ["<script>"], options=options)._repr_html_()
    with pytest.raises(UserError, match="prompt 1: expected text"):
        generate(str(adapter_run.run_dir), [3])


def test_a_model_of_learned_positions_refuses_longer_prompts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for model in (tokenizer, tiny_gpt2(tokenizer, n_positions=64)):
        model.save_pretrained(tmp_path)
    options = SamplingOptions(max_new_tokens=60, temperature=0)
    assert generate(str(tmp_path), ["Why?"], options=options, raw=True).rows[0]["policy_length"] <= 60
    with pytest.raises(UserError, match="prompt 2: 5 tokens and an answer of 60 are more than the 64 positions of the model"):
        generate(str(tmp_path), ["Why?", "Why??"], options=options, raw=True)
