"""Every notebook runs from top to bottom, and is stored with the outputs of its code."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from notebooks.execute import NOTEBOOKS, is_stale
from tests.small_gguf import shorten

ROOT = Path(__file__).parents[2]
STORED, CHART = 400_000, 100_000 * 4 // 3
"""Most bytes of a stored notebook, and of a chart in base64."""
PATH_OF_A_MACHINE = re.compile(r"/(home|root|tmp|Users|work|builds?)/")
LEAVES = {
    "01_quickstart": "prefray-demo/notebook/model/adapter_model.safetensors",
    "02_sweep": "prefray-demo/sweep/best.yaml",
    "03_cluster": "prefray-demo/cluster/shared/run/model/adapter_model.safetensors",
    "04_extend": "prefray-demo/extend/run/model/adapter_model.safetensors",
    "05_vision": "prefray-demo/vision/run/model/model.safetensors",
}
"""Notebook -> a file that it leaves."""
SHOWN = {"01_quickstart": 8, "02_sweep": 4, "03_cluster": 3, "04_extend": 1, "05_vision": 6}
"""Notebook -> outputs that are tables, pictures or progress, at least."""
SHORTER = {
    "05_vision": {
        "max_steps: 240": "max_steps: 24",
        "eval_steps: 120": "eval_steps: 12",
        "save_steps: 240": "save_steps: 24",
        "answers=60": "answers=8",
    }
}
"""Notebook -> what is replaced in it here: the stored one shows what the whole training comes to."""

AT_RELEASES = dict.fromkeys(("02_sweep", "03_cluster", "04_extend", "05_vision"), pytest.mark.release)
"""What they show, pages of the documentation do as well."""


@pytest.fixture(scope="module")
def shortened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose package stands in for that of the model, which the demo's test runs whole."""
    return shorten(tmp_path_factory.mktemp("shortened"))


@pytest.mark.realmodel
@pytest.mark.driver
@pytest.mark.parametrize("path", [pytest.param(path, marks=AT_RELEASES.get(path.stem, ()), id=path.stem) for path in NOTEBOOKS])
def test_a_notebook_runs(path: Path, shortened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [shortened, ROOT])))
    monkeypatch.delenv("RAY_AUTH_MODE")  # Ray is started as a person starts it
    notebook = nbformat.read(path, as_version=4)
    for whole, part in SHORTER.get(path.stem, {}).items():
        (cell,) = (cell for cell in notebook.cells if whole in cell.source)
        cell.source = cell.source.replace(whole, part)
    NotebookClient(notebook, timeout=1100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / LEAVES[path.stem]).is_file()
    assert _shown(notebook) >= SHOWN[path.stem]


def _shown(notebook: nbformat.NotebookNode) -> int:
    """Outputs that are more than text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum(bool({"text/html", "application/vnd.plotly.v1+json"} & set(output.get("data", {}))) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_outputs_of_its_code(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not is_stale(notebook), f"run `make notebooks NOTEBOOKS={path.stem}`"
    assert len(path.read_bytes()) < STORED
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        assert len(output.get("data", {}).get("image/png", "")) < CHART
        assert output.output_type != "error" and not PATH_OF_A_MACHINE.search(json.dumps(output)), output
