"""The changes that CONTRIBUTING.md shows are all that a loss, one with a parameter, and a strategy need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
PARAMETER = r"""
```diff
 # strategies/losses/regression.py
+def wide_hinge_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
+    r'''Return the hinge loss with a margin of its own, shape (B,).
+
+    `hinge` beyond a margin of $m$.
+
+    $$
+    \max(0, m - \beta \Delta)
+    $$
+    '''
+    values = scores(policy, reference, options)
+    return torch.relu(options.own.get("hinge_margin", 1.0) - options.beta * (values.chosen - values.rejected))
+
+
 def ipo_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
```
```diff
 # strategies/losses/table.py
     "hinge": _loss("regression.hinge_loss", "arXiv 2305.10425", "beta f_divergence"),
+    "wide_hinge": _loss("regression.wide_hinge_loss", "", "beta f_divergence hinge_margin"),
```
```diff
 # strategies/methods/dpo.py
     rpo_alpha: float | None = key("Weight of the chosen completion's negative log-likelihood per token (RPO).", ge=0)
+    dpo_hinge_margin: float | None = key("Margin of wide_hinge; 1 when not set.", option="hinge_margin", gt=0)
```
```diff
 # tests/strategies/losses/test_golden_values.py
     ("hinge", LossOptions(), [0.7, 1.4, 0.5]),
+    ("wide_hinge", LossOptions(), [0.7, 1.4, 0.5]),
+    ("wide_hinge", LossOptions(own={"hinge_margin": 2.0}), [1.7, 2.4, 1.5]),
```
```diff
 # tests/strategies/losses/test_traits.py
     ("discopop_tau", {"discopop_tau": 0.5}),
+    ("hinge_margin", {"own": {"hinge_margin": 2.0}}),
```
"""
"""A loss with a parameter, as the page says it without showing it: a function, a row, a key, and their tests."""
PROGRAM = """
from strategies.methods.registry import STRATEGIES
from strategies.losses import PAIR_LOSSES
from strategies.losses.table import loss_types
from strategies.config import as_config
from tests.laws.runs import losses, prepared, trained
from pathlib import Path
import pytest

assert "squared_hinge" in loss_types() and PAIR_LOSSES["squared_hinge"].__module__ == "strategies.losses.regression"
rows = prepared(4, {})
starts = {1.0: {"dpo_loss_type": "squared_hinge"}, 2.5: {"dpo_loss_type": "wide_hinge", "dpo_hinge_margin": 2.5}}
for start, keys in starts.items():
    assert losses(trained(Path(f"run-{start}"), rows=rows, max_steps=1, **keys)) == [start]
trainer = trained(Path("run"), rows=rows, max_steps=1, rl="cautious", cautious_weight=0.5, rl_beta=0.3)
assert (trainer.args.nll_alpha, trainer.beta, len(losses(trainer))) == (0.5, 0.3, 1)
assert "cautious_weight" in STRATEGIES["cautious"].keys
refused = {"dpo_loss_type: hinge; it is read by wide_hinge": {"dpo_loss_type": "hinge"}, "rl: ipo": {"rl": "ipo"}}
for message, keys in refused.items():
    with pytest.raises(ValueError, match=f"dpo_hinge_margin: has no effect with {message}"):
        as_config({"base_model": "m", "dpo_hinge_margin": 2, **keys})
"""
SECTION = r"""
### `wide_hinge`

`hinge` beyond a margin of $m$.

$$
\max(0, m - \beta \Delta)
$$

Reads `rl_beta`, `dpo_f_divergence_type`, `dpo_hinge_margin`; needs a reference.
"""
TESTS = ("tests/strategies/losses/test_traits.py", "tests/strategies/losses/test_golden_values.py", "tests/docs/test_losses.py")


def changes(text: str) -> Iterator[tuple[str, str]]:
    """File and diff of each block."""
    for block in re.findall(r"```diff\n(.*?)```", text, flags=re.DOTALL):
        name, _, diff = block.partition("\n")
        yield name.removeprefix(" # "), diff


def apply(diff: str, text: str) -> str:
    """The text with a diff's hunks, which `@@` parts, each found by the lines that it has in common with the text."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        assert text.count(before) == 1 or not before, before
        text = text.replace(before, after) if before else text + after
    return text


@pytest.mark.processes
def test_what_the_page_adds_trains_and_is_tested(tmp_path: Path) -> None:
    for name in ("cluster", "docs", "pipeline", "strategies", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, diff in changes(PAGE + PARAMETER):
        path = tmp_path / name
        path.write_text(apply(diff, path.read_text() if path.exists() else ""))
    for arguments in (["-m", "docs._ext.loss_sections"], ["-c", PROGRAM], ["-m", "pytest", "-q", "-n", "0", *TESTS]):
        run_in(tmp_path, *arguments)
    assert SECTION in (tmp_path / "docs" / "strategies.md").read_text()


def run_in(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
