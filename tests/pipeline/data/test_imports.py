"""Importing the package, and the text-only transforms, must not drag the heavy libraries in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "ray", "transformers", "datasets", "trl", "pyarrow"}
TRANSFORM = "from pipeline.data import load_transform; load_transform('chatml.intel')"


@pytest.mark.parametrize(("code", "heavy"), [("import pipeline.data", HEAVY), (TRANSFORM, HEAVY)])
def test_light_imports(code, heavy):
    check = f"import sys; {code}; print(*sorted(sys.modules.keys() & {heavy!r}))"
    root = Path(__file__).parents[3]
    output = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True, check=True)
    assert output.stdout.split() == []


def test_an_unknown_name():
    import pipeline.data

    with pytest.raises(AttributeError, match=r"'pipeline.data' has no attribute 'nothing'"):
        _ = pipeline.data.nothing
