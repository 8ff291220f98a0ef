from __future__ import annotations

import pytest

from pipeline.data.tokenize import opening_ids, tokenise
from pipeline.data.transforms import Rendered, load_transform


def pair(prompt, chosen, rejected, templated=False):
    return Rendered(prompt, (prompt + chosen, prompt + rejected), templated)


def decoded(tokenizer, row):
    return [tokenizer.decode(ids) for ids in (row.prompt, *row.completions)]


def test_eos_is_appended_once(tokenizer):
    (row,) = tokenise([pair("Q", "C", "R<|im_end|>")], tokenizer)
    assert decoded(tokenizer, row) == ["Q", "C<|im_end|>", "R<|im_end|>"]


@pytest.mark.parametrize("prompt", ["Q", "<s>Q"])
def test_bos_comes_once(bos_tokenizer, prompt):
    """Axolotl and TRL give two to a text that begins with one."""
    (row,) = tokenise([pair(prompt, "C", "R")], bos_tokenizer)
    assert decoded(bos_tokenizer, row) == ["<s>Q", "C<|im_end|>", "R<|im_end|>"]
    assert opening_ids(bos_tokenizer).tolist() == [bos_tokenizer.bos_token_id]


def test_templated_text_gets_neither(bos_tokenizer):
    (row,) = tokenise([pair("Q", "C", "R", templated=True)], bos_tokenizer)
    assert decoded(bos_tokenizer, row) == ["Q", "C", "R"]


def test_a_template_that_writes_bos(bos_tokenizer):
    """Axolotl doubles this BOS."""
    turns = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    template = turns + "{% if add_generation_prompt %}[assistant]{% endif %}"
    transform = load_transform("chat_template.default", tokenizer=bos_tokenizer, chat_template_jinja=template)
    (row,) = tokenise([transform.render({"messages": "Q", "chosen": "C", "rejected": "R"})], bos_tokenizer)
    assert decoded(bos_tokenizer, row) == ["<s>[user]Q<|im_end|>[assistant]", "C<|im_end|>", "R<|im_end|>"]


def test_the_completion_starts_where_tokens_diverge(tokenizer):
    """A prompt rendered otherwise alone: what the answers don't share with it is left out."""
    row = Rendered("Q<think>", ("Q<tC", "Q<tR"), templated=True)
    (ids,) = tokenise([row], tokenizer)
    assert decoded(tokenizer, ids) == ["Q<t", "C", "R"]


def test_a_prompt_alone(tokenizer, bos_tokenizer):
    for made, text in ((tokenizer, "Q"), (bos_tokenizer, "<s>Q")):
        (row,) = tokenise([Rendered("Q", (), templated=False)], made)
        assert decoded(made, row) == [text]
        assert row.length == len(text) if made is tokenizer else 2


def test_rows_come_in_order_over_batches(tokenizer, monkeypatch):
    monkeypatch.setattr("pipeline.data.tokenize.BATCH_CHARACTERS", 10)
    rows = [pair(f"prompt {number}", "C", "R") for number in range(7)]
    assert [tokenizer.decode(row.prompt) for row in tokenise(rows, tokenizer)] == [row.prompt for row in rows]
