"""The data sets that people use most: rows as their cards show them, under the type that one would choose."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.data.transforms import RowError, load_transform

U, A, B = (
    {"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", "Because."), ("assistant", "No."))
)
WHOLE = {"chosen": [U, A], "rejected": [U, B]}
ASKED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
ENDED = {"chosen": "Because.<|im_end|>", "rejected": "No.<|im_end|>"}
TALK = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
RANKED = [{"answer": "No.", "model": "b", "rank": 2.0}, {"answer": "Because.", "model": "a", "rank": 1.0}]
PREFERENCE = {"context": [U], "response1": "Because.", "response2": "No.", "overall_preference": -2, "domain": "general"}

SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "UltraFeedback binarized": (
        {},
        {"prompt": "Why?", "prompt_id": "a1", **WHOLE, "messages": [U, A], "score_chosen": 8.5, "score_rejected": 4.0},
        {"prompt": ASKED, "chosen": "Because.<|im_end|>\n", "rejected": "No.<|im_end|>\n"},
    ),
    "hh-rlhf": (
        {},
        {"chosen": f"{TALK} Because.", "rejected": f"{TALK} No."},
        {"prompt": TALK, "chosen": " Because.", "rejected": " No."},
    ),
    "orca pairs": (
        {"type": "chatml.intel"},
        {"system": "Be brief.", "question": "Why?", "chosen": "Because.", "rejected": "No."},
        {"prompt": f"<|im_start|>system\nBe brief.<|im_end|>\n{ASKED}", **ENDED},
    ),
    "distilabel mix": (
        {"type": "chat_template.argilla_chat"},
        {"dataset": "x", **WHOLE, "chosen_rating": 5.0, "rejected_rating": 2.0},
        {"prompt": ASKED, **ENDED},
    ),
    "HelpSteer3": (
        {
            "type": "chat_template.default",
            "field_messages": "context",
            "field_chosen": "response1",
            "field_rejected": "response2",
        },
        PREFERENCE,
        {"prompt": ASKED, **ENDED},
    ),
    "Nectar": (
        {"type": "zephyr.nectar"},
        {"prompt": f"{TALK} ", "answers": RANKED, "turns": 2, "num_responses": 2, "good_natured": True},
        {
            "prompt": "<|system|>\n</s>\n<|user|>\nHi?</s>\n<|assistant|>\nHello.</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n",
            "chosen": "Because.",
            "rejected": "No.",
        },
    ),
    "KTO mix 14k": (
        {"rl": "kto"},
        {"prompt": [U], "completion": [A], "label": True},
        {"prompt": ASKED, "completion": "Because.<|im_end|>\n"},
    ),
    "tulu-3 preference mixture": (
        {},
        {"id": "a", "source": "x", "prompt": "Why?", **WHOLE, "chosen_model": "a", "rejected_model": "b"},
        {"prompt": ASKED, "chosen": "Because.<|im_end|>\n", "rejected": "No.<|im_end|>\n"},
    ),
    "Skywork preference": (
        {"type": "chat_template.argilla_chat"},
        {**WHOLE, "source": "x"},
        {"prompt": ASKED, **ENDED},
    ),
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_data_set_is_rendered_as_it_should_be(tokenizer: Any, name: str) -> None:
    keys, row, expected = SHAPES[name]
    type, rl = keys.get("type"), keys.get("rl", "dpo")
    fields = {key: value for key, value in keys.items() if key not in ("type", "rl")}
    made = load_transform(type, rl, tokenizer, **fields)(row)
    assert {column: made[column] for column in expected} == expected


def test_which_answer_helpsteer3_prefers_is_told(tokenizer: Any) -> None:
    keys = {key: value for key, value in SHAPES["HelpSteer3"][0].items() if key != "type"}
    (found,) = load_transform("chat_template.default", tokenizer=tokenizer, **keys).rows(PREFERENCE)
    assert "overall_preference" in [note.detail for note in found.notes if note.kind == "may_be_the_label"]


def test_webgpt_comparisons_have_their_question_in_a_struct(tokenizer: Any) -> None:
    row = {"question": {"full_text": "Why?", "id": "1"}, "answer_0": "Because.", "answer_1": "No.", "score_0": 1, "score_1": -1}
    fields = {"field_prompt": "question", "field_chosen": "answer_0", "field_rejected": "answer_1"}
    with pytest.raises(RowError, match="'question' must be text, got dict"):
        load_transform("user_defined", tokenizer=tokenizer, **fields)(row)


def test_sharegpt_names_are_hinted_at(tokenizer: Any) -> None:
    row = {"conversations": [{"from": "human", "value": "Why?"}], "chosen": "Because.", "rejected": "No."}
    with pytest.raises(RowError, match="'conversations' holds messages with from and value: name them"):
        load_transform("chat_template.default", tokenizer=tokenizer)(row)
