from __future__ import annotations

import io

from rich.console import Console

from pipeline.data import Preview
from tests.pipeline.data.conftest import make_config, prepare_here, write_jsonl
from tests.tiny import pairs


def test_preview_reads_without_colour(tmp_path, tokenizer):
    rows = [{"prompt": "Say é", "chosen": "é\nok", "rejected": "R"}, *pairs(9)]
    prepared = prepare_here(make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "a.jsonl", rows))}), tokenizer)
    out = io.StringIO()
    Console(file=out, width=200, no_color=True).print(Preview(prepared, tokenizer))
    text = out.getvalue()
    assert "p50" in text and "too long" in text
    assert text.count("train row") == 3
    assert "Say é\n" in text
    assert "▏▏é▏⏎\n▏o▏k▏<|im_end|>" in text
    assert "▏R▏<|im_end|>" in text
    assert "chosen 6 tokens" in text
