"""Types that write turns themselves: exact strings, for every type and both formats."""

from __future__ import annotations

import pytest

from pipeline.data import dataset_types, load_transform
from pipeline.data.transforms import RowError
from pipeline.errors import UserError

SYSTEM = {"chatml": "<|im_start|>system\nS<|im_end|>\n", "llama3": "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"}
USER = {
    "chatml": "<|im_start|>user\n{}<|im_end|>\n",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
}
ASSISTANT = {
    "chatml": "<|im_start|>assistant\n{}<|im_end|>\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
}
OPEN = {"chatml": "<|im_start|>assistant\n", "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n"}
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}


def chat(*contents):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, contents, strict=False)]


PAIR_ROWS = {
    "default": {"question": "Q", "chosen_response": "C", "rejected_response": "R"},
    "argilla": {"instruction": "Q", "chosen_response": "C", "rejected_response": "R"},
    "argilla_chat": {"chosen": chat("Q", "C"), "rejected": chat("Q", "R")},
    "icr": {"input": "Q", "chosen": "C", "rejected": "R"},
    "intel": {"question": "Q", "chosen": "C", "rejected": "R"},
    "prompt_pairs": {"prompt": "Q", "chosen": "C", "rejected": "R"},
    "ultra": {"prompt": "Q", "chosen": chat("Q", "C"), "rejected": chat("Q", "R")},
}
COMPLETION_ROWS = {
    "default": {"question": "Q", "completion": "C"},
    "argilla": {"instruction": "Q", "completion": "C"},
    "argilla_chat": {"completion": chat("Q", "C")},
    "intel": {"question": "Q", "completion": "C"},
    "prompt_pairs": {"prompt": "Q", "completion": "C"},
    "ultra": {"prompt": "Q", "completion": "C"},
}


@pytest.mark.parametrize("system", [None, "", "S"])
@pytest.mark.parametrize("shape", PAIR_ROWS)
@pytest.mark.parametrize("turns", ["chatml", "llama3"])
def test_pairs(turns, shape, system):
    transform = load_transform(f"{turns}.{shape}", rl="dpo")
    assert transform({**PAIR_ROWS[shape], "system": system}) == {
        "prompt": (SYSTEM[turns] if system else "") + USER[turns].format("Q") + OPEN[turns],
        "chosen": "C" + END[turns],
        "rejected": "R" + END[turns],
    }


@pytest.mark.parametrize("system", [None, "S"])
@pytest.mark.parametrize("shape", COMPLETION_ROWS)
@pytest.mark.parametrize("turns", ["chatml", "llama3"])
def test_completions(turns, shape, system):
    transform = load_transform(f"{turns}.{shape}", rl="kto")
    assert transform({**COMPLETION_ROWS[shape], "system": system, "label": False}) == {
        "prompt": (SYSTEM[turns] if system else "") + USER[turns].format("Q") + OPEN[turns],
        "completion": "C" + END[turns],
        "label": False,
    }


def test_every_type_is_covered_here_or_next_door():
    turned = {f"{turns}.{shape}" for turns in ("chatml", "llama3") for shape in PAIR_ROWS}
    others = {"zephyr.nectar", "user_defined.default", "passthrough"}
    chats = {"chat_template.default", "chat_template.argilla_chat", "chat_template.argilla"}
    assert set(dataset_types("pair")) == turned | others | chats
    turned = {f"{turns}.{shape}" for turns in ("chatml", "llama3") for shape in COMPLETION_ROWS}
    assert set(dataset_types("unpaired")) == turned | {*others, *chats} - {"zephyr.nectar", "chat_template.argilla"}


@pytest.mark.parametrize("first", ["prompt", "input", "question", "instruction"])
def test_default_takes_the_first_question_column_there_is(first):
    row = {first: "Q", "chosen": "C", "rejected": "R"}
    assert load_transform("chatml")(row)["prompt"] == USER["chatml"].format("Q") + OPEN["chatml"]


@pytest.mark.parametrize("shape", ["argilla_chat", "ultra"])
@pytest.mark.parametrize("turns", ["chatml", "llama3"])
def test_later_turns_are_kept(turns, shape):
    """Axolotl takes turn 1 as the pair and forgets the rest."""
    row = {"prompt": "1", "chosen": chat("1", "2", "3", "C"), "rejected": chat("1", "2", "3", "R")}
    assert load_transform(f"{turns}.{shape}")(row) == {
        "prompt": USER[turns].format("1") + ASSISTANT[turns].format("2") + USER[turns].format("3") + OPEN[turns],
        "chosen": "C" + END[turns],
        "rejected": "R" + END[turns],
    }


def test_kto_argilla_chat_keeps_later_turns():
    row = {"completion": chat("1", "2", "3", "C"), "label": True}
    prompt = USER["chatml"].format("1") + ASSISTANT["chatml"].format("2") + USER["chatml"].format("3") + OPEN["chatml"]
    assert load_transform("chatml.argilla_chat", rl="kto")(row)["prompt"] == prompt


def test_nectar_pairs_the_best_with_the_worst():
    """Rank 1 is the best. Axolotl pairs ranks 4 and 3 of these."""
    answers = [{"answer": text, "rank": rank} for text, rank in [("bad", 3.0), ("best", 1.0), ("worst", 4.0), ("good", 2.0)]]
    assert load_transform("zephyr.nectar")({"prompt": "Q", "answers": answers}) == {
        "prompt": "<|system|>\n</s>\n<|user|>\nQ</s>\n<|assistant|>\n",
        "chosen": "best",
        "rejected": "worst",
    }


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "C", "rejected": "R"}, r"no column 'question' \(the row has chosen, rejected\)"),
        ({"question": "Q", "chosen": ["C"], "rejected": "R"}, "'chosen' must be text, got list"),
        ({"question": "Q", "chosen": "C", "rejected": " \n"}, "'rejected' is empty"),
        ({"question": "Q", "chosen": "C", "rejected": "C"}, "chosen and rejected are the same"),
        ({"question": "Q", "chosen": "C", "rejected": None}, "no column 'rejected'"),
        ({"question": "Q", "chosen": "C", "rejected": "R", "system": 1}, "'system' must be text, got int"),
    ],
)
def test_bad_rows(row, reason):
    with pytest.raises(RowError, match=reason):
        load_transform("chatml.intel")(row)


def test_answers_to_different_prompts_are_no_pair():
    row = {"chosen": chat("1", "C"), "rejected": chat("2", "R")}
    with pytest.raises(RowError, match="answer different prompts"):
        load_transform("chatml.argilla_chat")(row)


@pytest.mark.parametrize("given", [True, 1, 1.0, "true", "True", "1"])
def test_labels_that_mean_true(given):
    row = {"prompt": "Q", "completion": "C", "label": given}
    assert load_transform("chatml.ultra", rl="kto")(row)["label"] is True


@pytest.mark.parametrize("given", [False, 0, "false", "0"])
def test_labels_that_mean_false(given):
    row = {"prompt": "Q", "completion": "C", "label": given}
    assert load_transform("chatml.ultra", rl="kto")(row)["label"] is False


@pytest.mark.parametrize(
    ("given", "reason"), [("yes", "must be true, false, 1 or 0, got 'yes'"), (2, "got 2"), (None, "'label' is null")]
)
def test_labels_that_mean_nothing(given, reason):
    with pytest.raises(RowError, match=reason):
        load_transform("chatml.ultra", rl="kto")({"prompt": "Q", "completion": "C", "label": given})


def test_an_unknown_type_names_the_nearest_and_all():
    with pytest.raises(UserError, match=r"no dataset type 'chatml.inte' for rl: ipo; did you mean chatml.intel.*llama3.ultra"):
        load_transform("chatml.inte", rl="ipo")
    with pytest.raises(UserError, match="no dataset type 'zephyr.nectar' for rl: kto"):
        load_transform("zephyr.nectar", rl="kto")
