"""What a row holds, by method; and the way out for rows of another kind."""

from __future__ import annotations

import pytest

from pipeline.data import load_transform
from pipeline.data.row_kinds import COMPLETIONS, kind_of, methods, raw_kind
from pipeline.data.transforms import RowError
from pipeline.data.transforms.registry import FACTORIES
from pipeline.errors import UserError
from strategies.methods.registry import STRATEGIES

PAIR = {"prompt": "Q", "chosen": "C", "rejected": "R"}
LABELLED = {"prompt": "Q", "completion": "C", "label": True}


def test_every_method_has_a_kind_and_every_kind_its_types():
    assert {strategy.batch_kind for strategy in STRATEGIES.values()} == set(COMPLETIONS) == set(FACTORIES)
    assert [methods(kind) for kind in ("pair", "unpaired", "prompt")] == ["dpo, ipo, simpo, orpo", "kto", "grpo"]


def test_an_unknown_method():
    with pytest.raises(UserError, match="rl: unknown value 'ppo'; available: dpo, ipo, simpo, orpo, kto, grpo"):
        kind_of("ppo")
    with pytest.raises(UserError, match="rl: unknown value 'ppo'"):
        load_transform(None, rl="ppo")


@pytest.mark.parametrize("rl", ["dpo", "ipo", "simpo", "orpo", "grpo"])
def test_only_labelled_answers_are_made_by_splitting(rl):
    assert raw_kind("kto", split_pairs=True) == "pair"
    with pytest.raises(UserError, match=f"split_pairs: has no effect with rl: {rl}; it makes labelled answers, for rl: kto"):
        load_transform(None, rl=rl, split_pairs=True)


@pytest.mark.parametrize("rl", ["dpo", "simpo"])
@pytest.mark.parametrize(
    ("type", "missing"), [(None, "chosen"), ("chatml.prompt_pairs", "chosen"), ("chatml.intel", "question")]
)
def test_labelled_rows_where_pairs_are_wanted(rl, type, missing):
    reason = rf"no column '{missing}' .*; this needs pairs \(chosen, rejected\): rl: kto takes rows with completion and label"
    with pytest.raises(RowError, match=reason):
        load_transform(type, rl=rl)(LABELLED)


@pytest.mark.parametrize(("type", "row"), [(None, PAIR), ("chatml.ultra", PAIR), ("user_defined", PAIR)])
def test_pairs_where_labelled_rows_are_wanted(type, row):
    reason = (
        r"no column 'completion' .*; the row is a pair \(chosen, rejected\): split_pairs: true makes two labelled rows of it, "
        "and rl: dpo, ipo, simpo, orpo takes pairs"
    )
    with pytest.raises(RowError, match=reason):
        load_transform(type, rl="kto")(row)


def test_a_labelled_row_without_its_label():
    reason = r"^no column 'label' \(the row has prompt, completion\); label is true for a good completion and false for"
    with pytest.raises(RowError, match=reason):
        load_transform(None, rl="kto")({"prompt": "Q", "completion": "C"})


@pytest.mark.parametrize(("rl", "rows"), [("dpo", [PAIR]), ("kto", [LABELLED]), ("grpo", [{"prompt": "Q"}])])
def test_a_data_set_wrapped_into_an_object(rl, rows):
    with pytest.raises(RowError, match="the row is one object with a list under 'data', and rows must be a plain list or one"):
        load_transform(None, rl=rl)({"data": rows})


def test_a_lone_column_of_messages_is_no_data_set(tokenizer):
    transform = load_transform("chat_template.default", rl="grpo", tokenizer=tokenizer)
    with pytest.raises(RowError, match=r"messages\[0\] has no 'role' \(it has from, value\); name it in \w+$"):
        transform({"messages": [{"from": "human", "value": "Q"}]})


def test_labelled_messages_for_a_method_of_pairs(tokenizer):
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "label": True}
    with pytest.raises(RowError, match="this needs pairs .chosen, rejected.: rl: kto takes rows with completion and label"):
        load_transform("chat_template.default", rl="dpo", tokenizer=tokenizer)(row)
