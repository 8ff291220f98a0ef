"""The table of rules in `docs/reports.md`: copied from `pipeline/findings/rules.py`.

GitHub shows the page as well as the site, so the table is written into it, between markers:

    python -m docs._ext.rule_table
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.findings.rules import RULES

__all__ = ["COMMAND", "PAGE", "with_table"]

PAGE = Path(__file__).parents[1] / "reports.md"
COMMAND = "python -m docs._ext.rule_table"
BLOCK = re.compile(rf"(<!-- {re.escape(COMMAND)} writes this -->\n).*?(<!-- end -->\n)", flags=re.DOTALL)


def with_table(page: str) -> str:
    """Return the page with the table as the code says it."""
    rows = [f"| `{rule.name}` | {rule.when} | {_linked(rule.source)} |" for rule in RULES]
    table = "\n".join(["| rule | finds | source |", "|---|---|---|", *rows])
    return BLOCK.sub(lambda block: f"{block[1]}\n{table}\n\n{block[2]}", page)


def _linked(source: str) -> str:
    papers = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)
    return re.sub(r"https://github.com/([\w-]+)/([\w-]+)/issues/(\d+)", r"[\2#\3](\g<0>)", papers)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
