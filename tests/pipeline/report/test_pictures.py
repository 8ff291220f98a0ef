"""Rows with their pictures on a run's page: small, few, and read again from the store."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import parse_config
from pipeline.data.store import CHECKSUM, COUNTS, MANIFEST, checksum
from pipeline.demo.pictures import picture_pairs
from pipeline.report.page import Page, render
from pipeline.report.rows import Rows
from tests.browser import faint, needs_chromium, open_page

FINGERPRINT = "f" * 16
SIZES = """[...document.images].map((image) => {
    const room = image.getBoundingClientRect();
    return [image.naturalWidth, room.width, room.height];
})"""
"""Of each picture of a page: its own width, and the room that it has."""


def row(index: int, images: list[str], **others: Any) -> dict[str, Any]:
    texts = {"prompt": f"<image>Question {index}?", "chosen": f"right {index}", "rejected": f"wrong {index}", **others}
    return {**texts, **{f"{name}_length": len(text) for name, text in texts.items()}, "images": images}


def write_store(folder: Path, rows: list[dict[str, Any]], kind: str = "pair", pictures: int = 3) -> None:
    """A store as `prepare` leaves it, as far as a page reads it."""
    store = folder / FINGERPRINT
    (store / "train").mkdir(parents=True)
    for index, part in enumerate((rows[:1], rows[1:])):
        pq.write_table(pa.Table.from_pylist(part), store / "train" / f"{index}.parquet")
    files = [{"file": f"train/{index}.parquet", "rows": number} for index, number in ((0, 1), (1, len(rows) - 1))]
    source = {"path": "pairs.jsonl", **dict.fromkeys(COUNTS, len(rows))}
    manifest: dict[str, Any] = {"format_version": 99, "fingerprint": FINGERPRINT, "kind": kind, "sources": [source]}
    manifest |= {"files": files, "notes": [], "lengths": {}} | ({"pictures": pictures} if pictures else {})
    (store / MANIFEST).write_text(json.dumps({**manifest, CHECKSUM: checksum(manifest)}))


def write_picture(folder: Path, name: str, image: Image.Image, **options: Any) -> str:
    path = folder / FINGERPRINT / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return name


def whole_page(folder: Path) -> str:
    """The sections about the data, rendered."""
    keys = {"base_model": "m", "datasets": [{"path": "pairs.jsonl"}], "val_set_size": 4, "dataset_prepared_path": str(folder)}
    return render(Page("Run", "", [], Rows.of(parse_config(keys), FINGERPRINT).sections))


def page(folder: Path) -> str:
    """The same without plotly."""
    html = whole_page(folder)
    return html[html.index("<body>") :]


def thumbnails(html: str) -> list[Image.Image]:
    urls = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(urls) == html.count("<img")
    return [Image.open(io.BytesIO(base64.b64decode(url))) for url in urls]


def noise(side: int) -> Image.Image:
    return Image.frombytes("RGB", (side, side), random.Random(0).randbytes(3 * side * side))


def test_rows_with_pictures_are_shown_small(tmp_path: Path) -> None:
    wide = write_picture(tmp_path, "ab/wide.jpg", noise(900).resize((900, 300)))
    clear = write_picture(tmp_path, "cd/clear.png", Image.new("RGBA", (20, 30), (0, 0, 0, 0)))
    write_store(tmp_path, [row(0, []), row(1, [wide, clear]), row(2, [clear])])
    html = page(tmp_path)
    first, second, third = thumbnails(html)
    assert (first.size, second.size, third.size) == ((96, 32), (20, 30), (20, 30))
    assert second.getpixel((10, 10)) == (255, 255, 255)  # as models see it
    assert 'alt="ab/wide.jpg, 900 x 300 pixels"' in html and "3 different pictures" in html
    assert "Question 0?" not in html and "&lt;image&gt;Question 1?" in html and "right 2" in html and "wrong 2" in html


def test_the_page_stays_small(tmp_path: Path) -> None:
    """Few rows, few pictures of each, however many and large there are."""
    name = write_picture(tmp_path, "ab/noise.png", noise(1500))
    write_store(tmp_path, [row(index, [name] * 9) for index in range(100)])
    html = page(tmp_path)
    assert len(thumbnails(html)) == 16 and "prompt (the first 4 of 9 pictures)" in html
    assert len(html) < 16 * 12_000 + 60_000


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    good = write_picture(tmp_path, "ab/good.png", noise(40))
    cut = write_picture(tmp_path, "ab/cut.png", noise(40))
    path = tmp_path / FINGERPRINT / "images" / cut
    path.write_bytes(path.read_bytes()[:300])
    (path.parent / "text.jpg").write_text("<script>no picture</script>")
    write_store(tmp_path, [row(0, [good]), row(1, [cut]), row(2, ["ab/gone.png"]), row(3, ["ab/text.jpg"])])
    html = page(tmp_path)
    assert len(thumbnails(html)) == 1
    for name in ("cut.png", "gone.png", "text.jpg"):
        assert re.search(rf"<span>ab/{name}: a picture can&#39;t be read: .+</span>", html), name
    assert all(f"Question {index}?" in html for index in range(4))


def test_labelled_rows_say_their_label(tmp_path: Path) -> None:
    name = write_picture(tmp_path, "ab/one.png", next(picture_pairs(held_out=False))["images"][0])
    rows = [
        {"prompt": "p", "prompt_length": 1, "completion": "c", "completion_length": 1, "label": label, "images": [name]}
        for label in (True, False)
    ]
    write_store(tmp_path, rows, kind="unpaired")
    assert re.findall(r"<h3>(\w+)</h3>", page(tmp_path)) == ["prompt", "desirable", "prompt", "undesirable"]


@pytest.mark.parametrize("images", [False, True])
def test_a_store_of_text_has_no_such_section(tmp_path: Path, images: bool) -> None:
    rows = [row(index, []) for index in range(3)]
    if not images:
        rows = [{name: value for name, value in one.items() if name != "images"} for one in rows]
    write_store(tmp_path, rows, pictures=0)
    html = page(tmp_path)
    assert "Length of training rows" in html and 'id="pictures"' not in html and "sample" not in html


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_thumbnails_in_a_browser(tmp_path: Path, width: int, scheme: str) -> None:
    wide = write_picture(tmp_path, "ab/wide.jpg", noise(900).resize((900, 300)))
    write_store(tmp_path, [row(0, [wide] * 9), row(1, ["ab/gone.png"])])
    (tmp_path / "page.html").write_text(whole_page(tmp_path), encoding="utf-8")
    with open_page(tmp_path / "page.html", width, scheme) as (opened, said):
        sizes = opened.evaluate(SIZES)
        assert sizes == [[96, 98, 34]] * 4  # with a border of one pixel, and not stretched
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        assert faint(opened) == [] and said == []
