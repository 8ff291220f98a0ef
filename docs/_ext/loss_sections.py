"""What `docs/strategies.md` says of the pair losses: copied from the docstrings of their functions and the table of losses.

GitHub shows the page as well as the site, so the text is written into it, between markers:

    python -m docs._ext.loss_sections
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from strategies.keys import options_of
from strategies.losses.table import LOSSES, loss_types
from strategies.methods.registry import STRATEGIES, BuiltInKeys

__all__ = ["COMMAND", "PAGE", "with_sections"]

PAGE = Path(__file__).parents[1] / "strategies.md"
COMMAND = "python -m docs._ext.loss_sections"
COUPLES = "couples the pairs of the whole global batch, however it is split into workers and forward passes"
BLOCK = re.compile(rf"(<!-- {re.escape(COMMAND)} writes (?P<what>\w+) -->\n).*?(<!-- end -->\n)", flags=re.DOTALL)


def with_sections(page: str) -> str:
    """Return the page with all blocks between markers as the code says them."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{_block(block['what'])}\n\n{block[3]}", page)


def _block(what: str) -> str:
    """Return the text of a block: `sections` of all values of `dpo_loss_type`, `divergences`, or the name of a loss."""
    if what == "sections":
        return "\n\n".join(f"### `{name}`\n\n{_text(name)}" for name in _by_family())
    if what == "divergences":
        readers = (f"`{name}`" for name in _by_family() if "f_divergence" in LOSSES[name].reads)
        return f"It applies to losses of $\\Delta$: {', '.join(readers)}."
    return _text(what)


def _by_family() -> list[str]:
    modules = {name: LOSSES[name].load().__module__ for name in loss_types()}
    order = list(dict.fromkeys(modules.values()))
    return sorted(modules, key=lambda name: order.index(modules[name]))


def _text(name: str) -> str:
    """Return what the docstring says after its first paragraph, with links to arXiv, and the properties of the loss."""
    _, _, text = (inspect.getdoc(LOSSES[name].load()) or "").partition("\n\n")
    linked = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return f"{linked}\n\n{_properties(name)}".strip()


def _properties(name: str) -> str:
    loss = LOSSES[name]
    strategy = STRATEGIES[name if loss.strategy else "dpo"]
    setting = {key: option for group in BuiltInKeys.__bases__ for key, option in options_of(group).items()}
    keys = [f"`{key}`" for key, option in setting.items() if option in loss.reads and key in strategy.keys]
    said = [f"Reads {', '.join(keys) or 'no key'}", "needs a reference" if loss.reference else "needs no reference"]
    said += ["averages over tokens"] if loss.lengths else []
    said += [COUPLES] if loss.couples else []
    return f"{'; '.join(said)}."


if __name__ == "__main__":
    PAGE.write_text(with_sections(PAGE.read_text()))
