from __future__ import annotations

import pytest

from pipeline.data import load_transform
from pipeline.data.transforms import RowError


def said(text, role="assistant"):
    return {"role": role, "content": text}


def test_implicit_prompt_gives_its_last_space_to_the_answers():
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert load_transform(None)(row) == {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}


def test_a_prompt_that_only_repeats_the_conversation_as_text(tokenizer):
    """As UltraFeedback has it; the conversations hold the prompt already."""
    row = {"prompt": "Q", "chosen": [said("Q", "user"), said("C")], "rejected": [said("Q", "user"), said("R")]}
    assert load_transform("passthrough", tokenizer=tokenizer)(row) == {
        "prompt": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "chosen": "C<|im_end|>\n",
        "rejected": "R<|im_end|>\n",
    }


def test_a_prompt_that_repeats_all_turns_as_one_text(tokenizer):
    """As Capybara has it."""
    turns = [said("Hello!", "user"), said("Hi."), said("Add 1 to 2.", "user")]
    answers = {"chosen": [*turns, said("3")], "rejected": [*turns, said("4")]}
    render = load_transform(None, tokenizer=tokenizer)
    assert render({"prompt": "Hello!\nHi.\nAdd 1 to 2.", **answers}) == render(answers)
    with pytest.raises(RowError, match="'prompt' is not in the turns that chosen and rejected share"):
        render({"prompt": "Hello!\nAdd 1 to 2.", **answers})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "chosen": "C"}, "no column 'rejected'"),
        ({"prompt": "Q", "chosen": "C", "rejected": "C"}, "chosen and rejected are the same"),
        ({"prompt": "Q", "chosen": "C", "rejected": [said("R")]}, "chosen is text, rejected is messages"),
        ({"chosen": "abc", "rejected": "xyz"}, "share no beginning"),
        ({"prompt": "Q", "chosen": 3, "rejected": "R"}, "'chosen' must be text, got int"),
        ({"prompt": [said("Q", "user")], "chosen": [said("C")], "rejected": [said(" ")]}, "'rejected' is empty"),
    ],
)
def test_bad_rows(tokenizer, row, reason):
    with pytest.raises(RowError, match=reason):
        load_transform(None, tokenizer=tokenizer)(row)
