"""The site is built without a warning, and shows what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
import strategies
from pipeline.config import RunConfig
from strategies.losses.table import loss_types
from tests.docs.blocks import ROOT

pytestmark = pytest.mark.install
BUILT_WITHIN_S = 500


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as `make docs` builds them."""
    folder = tmp_path_factory.mktemp("site")
    words = re.search(r"-m (sphinx .*) docs build/docs", (ROOT / "Makefile").read_text())
    assert words is not None and "-W" in words[1]
    command = [sys.executable, "-m", *words[1].split(), "docs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=BUILT_WITHIN_S, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_key_has_an_entry(site: Path) -> None:
    page = (site / "config.html").read_text()
    for name in RunConfig.model_fields:
        assert f'id="confval-{name}"' in page, name
    for nested in ("datasets.-.type", "trl.num_generations", "ray.num_workers.max", "tune.space.-.loguniform"):
        assert f'id="confval-{nested}"' in page, nested


def test_every_loss_has_its_formula(site: Path) -> None:
    page = (site / "strategies.html").read_text()
    for name in loss_types():
        section = page.split(f'<section id="{name.replace("_", "-")}">')[1].split("</section>")[0]
        assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in section, name


def test_every_public_name_is_described(site: Path) -> None:
    page = (site / "python.html").read_text()
    for package in (pipeline, strategies):
        for name in package.__all__:
            assert f'id="{package.__name__}.{name}"' in page, name


def test_the_site_needs_no_network(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="(https?:[^"]*)"', page.read_text())
        assert not loaded, page
