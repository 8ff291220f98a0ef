"""Ids of TRL's own shapes: the same as TRL's trainers make, special tokens, tools and all."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.data import load_transform
from pipeline.data.tokenize import tokenise
from pipeline.data.transforms import RowError

TEMPLATES = Path(next(iter(importlib.util.find_spec("trl").submodule_search_locations))) / "chat_templates"


def said(text, role="assistant", **more):
    return {"role": role, "content": text, **more}


USER = said("What is it?", "user")
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]
CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
PAIRS = {
    "explicit text": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    "implicit text": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "text that ends with eos": {"prompt": "The sky is", "chosen": " blue.<|im_end|>", "rejected": " green."},
    "explicit messages": {"prompt": [said("S", "system"), USER], "chosen": [said("C")], "rejected": [said("R")]},
    "implicit messages": {"chosen": [USER, said("C")], "rejected": [USER, said("R")]},
    "several turns": {"prompt": [USER, said("A"), said("B", "user")], "chosen": [said("C")], "rejected": [said("R")]},
    "thinking": {"prompt": [USER], "chosen": [said("<think>\nr\n</think>\n\nC")], "rejected": [said("R")]},
    "template kwargs": {
        "prompt": [USER],
        "chosen": [said("<think>\nr\n</think>\n\nC")],
        "rejected": [said("R")],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "tools": {"prompt": [USER], "chosen": [said("", tool_calls=[CALL])], "rejected": [said("R")], "tools": TOOLS},
    "tools as text": {"prompt": [USER], "chosen": [said("C")], "rejected": [said("R")], "tools": json.dumps(TOOLS)},
}


@pytest.fixture(scope="module", params=["chatml", "qwen3", "qwen3 with bos"])
def any_tokenizer(request):
    from tests.pipeline.data.conftest import with_bos
    from tests.tiny import tiny_tokenizer

    made = tiny_tokenizer()
    if "qwen3" in request.param:
        made.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    return with_bos(made) if "bos" in request.param else made


def all_prepared_by_trl(trainer, row, tokenizer):
    from datasets import Dataset

    dataset = Dataset.from_list([row])
    stand_in = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    return trainer._prepare_dataset(stand_in, dataset, tokenizer, args, "train").to_list()


def prepared_by_trl(trainer, row, tokenizer):
    return all_prepared_by_trl(trainer, row, tokenizer)[0]


def refuses_tools(name, tokenizer, rl, row):
    """The one departure from TRL, which would drop tools that the template doesn't know, and train the model on nothing."""
    if "tool" not in name or "tool" in tokenizer.chat_template:
        return False
    with pytest.raises(RowError, match="the chat template does not render tool"):
        load_transform(None, rl=rl, tokenizer=tokenizer).render(row)
    return True


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(any_tokenizer, name):
    from trl import DPOTrainer

    if refuses_tools(name, any_tokenizer, "dpo", PAIRS[name]):
        return
    expected = prepared_by_trl(DPOTrainer, PAIRS[name], any_tokenizer)
    (ours,) = tokenise([load_transform(None, tokenizer=any_tokenizer).render(PAIRS[name])], any_tokenizer)
    assert ours.prompt.tolist() == expected["prompt_ids"]
    assert [ids.tolist() for ids in ours.completions] == [expected["chosen_ids"], expected["rejected_ids"]]


@pytest.mark.parametrize("name", ["explicit text", "explicit messages", "thinking", "tools"])
def test_completions(any_tokenizer, name):
    from trl import KTOTrainer

    row = {key: value for key, value in PAIRS[name].items() if key not in ("chosen", "rejected")}
    row |= {"completion": PAIRS[name]["chosen"], "label": False}
    if refuses_tools(name, any_tokenizer, "kto", row):
        return
    expected = prepared_by_trl(KTOTrainer, row, any_tokenizer)
    rendered = load_transform("passthrough", rl="kto", tokenizer=any_tokenizer).render(row)
    (ours,) = tokenise([rendered], any_tokenizer)
    assert rendered.label is False
    assert ours.prompt.tolist() == expected["prompt_ids"]
    assert [ids.tolist() for ids in ours.completions] == [expected["completion_ids"]]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_split_into_completions(any_tokenizer, name):
    """Both halves, as `unpair_preference_dataset` and the trainer make them."""
    from trl import KTOTrainer

    if refuses_tools(name, any_tokenizer, "dpo", PAIRS[name]):
        return
    expected = all_prepared_by_trl(KTOTrainer, PAIRS[name], any_tokenizer)
    halves = load_transform(None, rl="kto", tokenizer=any_tokenizer, split_pairs=True).rows(PAIRS[name])
    assert [half.label for half in halves] == [row["label"] for row in expected] == [True, False]
    for ours, row in zip(tokenise(halves, any_tokenizer), expected, strict=True):
        assert ours.prompt.tolist() == row["prompt_ids"]
        assert [ids.tolist() for ids in ours.completions] == [row["completion_ids"]]


PROMPTS = {
    "text": {"prompt": "The sky is", "answer": "blue"},
    "messages": {"prompt": [said("S", "system"), USER]},
    "several turns": {"prompt": [USER, said("A"), said("B", "user")]},
    "a tool's turn": {"prompt": [USER, said("", tool_calls=[CALL]), said("4 C", "tool")]},
    "implicit messages": {"chosen": [USER, said("C")], "rejected": [USER, said("R")]},
    "rendered text": {"messages": [USER]},
    "chatml text": {"question": "What is it?"},
}
TYPES = {"rendered text": "chat_template.default", "chatml text": "chatml.intel"}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(any_tokenizer, name):
    """What the trainer makes of the row it is handed, after a way through JSON."""
    from trl import GRPOTrainer

    row, transform = PROMPTS[name], load_transform(TYPES.get(name), rl="grpo", tokenizer=any_tokenizer)
    if refuses_tools(name, any_tokenizer, "grpo", row):
        return
    rendered = transform.render(row)
    handed = json.loads(json.dumps(rendered.reward_columns))
    stand_in = SimpleNamespace(
        processing_class=any_tokenizer,
        tools=[],
        chat_template=None,
        chat_template_kwargs={},
        environment_factories=None,
        _is_vlm=False,
    )
    (expected,), *_ = GRPOTrainer._tokenize_prompts(stand_in, [handed["prompt"]])
    (ours,) = tokenise([rendered], any_tokenizer)
    assert ours.prompt.tolist() == expected
    assert ours.completions == ()
