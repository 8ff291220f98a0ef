"""The page has the rules that the code has."""

from __future__ import annotations

from docs._ext.rule_table import COMMAND, PAGE, with_table


def test_the_table_is_what_the_code_says() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert f"<!-- {COMMAND} writes this -->" in text
    assert with_table(text) == text, f"docs/reports.md lags behind the rules; run: .venv/bin/{COMMAND}"
