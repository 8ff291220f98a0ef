"""A chat template that prints the date prints one date, whenever the data are prepared."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.data import dates, plan
from pipeline.data.transforms import load_transform
from pipeline.training.worker import _with_day
from tests.pipeline.data.conftest import make_config, prepare_here, write_jsonl
from tests.tiny import pairs, tiny_tokenizer

TEMPLATE = (
    "Today: {{ strftime_now('%d %b %Y') }}\n{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def dated() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def config(tmp_path: Any) -> Any:
    rows = [
        {
            name: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
            for name in ("chosen", "rejected")
        }
        for row in pairs(5)
    ]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))

    def make(**changes: Any) -> Any:
        return make_config(tmp_path, {"path": path}, **changes)

    return make


def set_clock(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    class Date(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return cls.fromisoformat(day)

    monkeypatch.setattr(plan, "date", Date)


def test_it_stays_that_of_the_first_preparing(config: Any, dated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, "2024-02-29")
    first = prepare_here(config(), dated)
    assert all(prompt.startswith("Today: 29 Feb 2024\n") for prompt in first.read()["prompt"].to_pylist())
    set_clock(monkeypatch, "2025-01-01")
    again = prepare_here(config(), dated)
    assert again.path == first.path
    longer = prepare_here(config(sequence_len=1000), dated)  # other data: their first preparing is today
    assert longer.read()["prompt"][0].as_py().startswith("Today: 01 Jan 2025\n")
    assert len({first.fingerprint, longer.fingerprint}) == 2


def test_it_is_told_and_can_be_set(config: Any, dated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, "2024-02-29")
    (note,) = [note for note in prepare_here(config(), dated).notes if "date" in note]
    assert note.startswith("5 rows: the chat template prints the date, and says '2024-02-29' each time")
    assert "template_date" in note
    given = prepare_here(config(template_date=datetime.date(2020, 12, 24)), dated)
    assert given.read()["prompt"][0].as_py().startswith("Today: 24 Dec 2020\n")
    assert given.manifest["inputs"]["template_date"] == "2020-12-24"
    set_clock(monkeypatch, "2025-01-01")
    assert prepare_here(config(), dated).manifest["inputs"]["template_date"] == "2024-02-29"


def test_other_templates_have_none(config: Any, tokenizer: Any) -> None:
    prepared = prepare_here(config(), tokenizer)
    assert "template_date" not in prepared.manifest["inputs"]
    assert prepare_here(config(template_date=datetime.date(2020, 12, 24)), tokenizer).path == prepared.path


def test_a_row_that_is_looked_at_alone_has_that_of_the_clock(dated: Any) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    messages = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    transform = load_transform(None, tokenizer=dated)
    rendered = transform({"prompt": [{"role": "user", "content": "a"}], **messages})
    assert rendered["prompt"].startswith(datetime.date.today().strftime("Today: %d %b %Y"))


@pytest.mark.parametrize("named", [False, True])
def test_a_trainer_that_renders_prompts_itself_prints_it_too(dated: Any, named: bool) -> None:
    """And the tokenizer that is saved stays as it is."""
    dated.chat_template = {"default": TEMPLATE} if named else TEMPLATE
    manifest = {"kind": "prompt", "inputs": {"template_date": "2020-12-24"}}
    told = _with_day(dated, SimpleNamespace(manifest=manifest))
    rendered = told.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert rendered == "Today: 24 Dec 2020\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert dated.chat_template == ({"default": TEMPLATE} if named else TEMPLATE)
    for other in ({**manifest, "kind": "pair"}, {**manifest, "inputs": {}}):
        assert _with_day(dated, SimpleNamespace(manifest=other)) is dated


def test_blanks_before_a_block_stay_those_of_a_line(dated: Any, config: Any) -> None:
    """Which Jinja leaves out, as it is told to."""
    dated.chat_template = "  {% set day = strftime_now('%-d.%m.%y, %f %%') %}[{{ day }}]" + TEMPLATE.partition("\n")[2]
    prompt = prepare_here(config(template_date=datetime.date(2020, 2, 4)), dated).read()["prompt"][0].as_py()
    assert prompt.startswith("[4.02.20, 000000 %]<|im_start|>")


@pytest.mark.parametrize("directive", ["%_d", "%^b", "%-e", "%Ey", "%Od", "%#Z"])
def test_flags_of_directives_are_those_of_this_system(directive: str, tokenizer: Any) -> None:
    day = datetime.date(2024, 5, 7)
    expected = datetime.datetime.combine(day, datetime.time()).strftime(directive)
    given = dates.dated("{{ strftime_now('" + directive + "') }}", day)
    turns = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(turns, chat_template=given, tokenize=False) == expected
