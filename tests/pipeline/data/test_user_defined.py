from __future__ import annotations

import pytest

from pipeline.config import parse_config
from pipeline.data import load_transform
from pipeline.data.transforms import RowError
from pipeline.errors import ConfigError, UserError

ROW = {"ask": "Q", "sys": "S", "good": "C", "bad": "R"}
FIELDS = {"field_prompt": "ask", "field_system": "sys", "field_chosen": "good", "field_rejected": "bad"}


def test_formats_and_columns():
    given = {**FIELDS, "prompt_format": "[{system}] {prompt} ->", "chosen_format": "{chosen}!", "rejected_format": "{bad}?"}
    assert load_transform(given)(ROW) == {"prompt": "[S] Q ->", "chosen": "C!", "rejected": "R?"}


def test_without_formats_text_stays_as_it_is():
    assert load_transform(FIELDS)(ROW) == {"prompt": "Q", "chosen": "C", "rejected": "R"}


def test_the_fields_may_be_keys_of_the_dataset():
    assert load_transform("user_defined.default", **FIELDS)(ROW) == {"prompt": "Q", "chosen": "C", "rejected": "R"}


@pytest.mark.parametrize("rl", ["dpo", "kto"])
def test_a_missing_system_is_empty(rl):
    """Axolotl raises KeyError for kto."""
    given = {"prompt_format": "<{system}>{prompt}"}
    row = {"prompt": "Q", "chosen": "C", "rejected": "R", "completion": "C", "label": True}
    assert load_transform(given, rl=rl)(row)["prompt"] == "<>Q"


def test_braces_in_the_data_are_text():
    given = {"prompt_format": "{prompt}{{}}"}
    row = {"prompt": "{system}", "chosen": "{x}", "rejected": "R"}
    assert load_transform(given)(row) == {"prompt": "{system}{}", "chosen": "{x}", "rejected": "R"}


def test_kto():
    given = {"field_prompt": "ask", "field_completion": "good", "field_label": "ok", "completion_format": "{completion}."}
    assert load_transform(given, rl="kto")({**ROW, "ok": "true"}) == {"prompt": "Q", "completion": "C.", "label": True}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"field_promt": "ask"}, r"type.field_promt: unknown key; did you mean 'field_prompt'\?"),
        ({"prompt_format": "{instruction}"}, r"type.prompt_format: unknown placeholder \{instruction\}; allowed: \{prompt\}"),
        ({"chosen_format": "{chosen"}, r"type.chosen_format: expected '}' .*write {{ and }} for braces"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(UserError, match=message):
        load_transform(given)


def test_bad_row():
    with pytest.raises(RowError, match="no column 'ask'"):
        load_transform(FIELDS)({"good": "C", "bad": "R"})


@pytest.mark.parametrize(
    ("key", "template", "message"),
    [
        ("prompt_format", "{prompt:>9d}", "'{prompt:>9d}' formats a placeholder; write {prompt} alone"),
        ("prompt_format", "{prompt!x}", "formats a placeholder"),
        ("prompt_format", "Hello", "'Hello' holds {prompt} 0 times; it must stand there once"),
        ("chosen_format", "yes", "'yes' holds {chosen} 0 times"),
        ("prompt_format", "{prompt} {prompt}", "holds {prompt} 2 times"),
    ],
)
def test_a_format_that_cannot_be_filled_is_a_problem_of_the_recipe(key: str, template: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"base_model": "m", "datasets": [{"path": "a", "type": {key: template}}]})
    ((path, said),) = caught.value.problems
    assert path == f"datasets.0.type.{key}" and message in said
