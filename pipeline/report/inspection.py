"""Page of an inspection: findings, histograms, and the strangest rows of each kind with the text that is trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from pipeline.config import RunConfig
from pipeline.config.selection import ROW_COLUMNS
from pipeline.data.row_kinds import COMPLETIONS
from pipeline.data.store import EVAL, TRAIN, Prepared
from pipeline.errors import UserError
from pipeline.inspection.columns import measures_folder
from pipeline.inspection.parts import parts_of
from pipeline.inspection.result import FINDINGS, NOT_SHOWN, NOTHING, QUANTILES, Inspection
from pipeline.inspection.strangest import StrangeRows, strangest
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, Location, inside, reason
from pipeline.report.findings import notice
from pipeline.report.page import (
    COLOURS,
    Chart,
    Column,
    Comparison,
    Fact,
    Message,
    Notice,
    Page,
    Row,
    Section,
    Table,
    chart,
    render,
)
from pipeline.ui.findings import is_wrong, read_finding
from strategies.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NAME", "inspected_section", "inspection_page", "write_inspection"]

NAME = "inspect.html"
BINS = 50
TAIL = 0.005
"""Share of values at either end that a histogram shows in its first and last bar."""
NOT_DRAWN = (*NOT_SHOWN, "answers_without_end")
MEANING = {"tokens": "tokens of the prompt and all answers", "benchmark_overlap": "share of 8-grams that a benchmark has too"}


def write_inspection(inspection: Inspection, cfg: RunConfig, output: str | Path | None = None) -> Location:
    """Write the page of an inspection.

    Args:
        inspection: result of `inspect`.
        cfg: its recipe, for the tokenizer.
        output: the file to write; `inspect.html` beside the columns when None.

    Returns:
        Path of the page.

    Raises:
        UserError: when it can't be written.
    """
    folder, name = inspection.columns[0].folder, NAME
    if output is not None:
        target = Path(os.path.expanduser(output)).absolute()
        if target.is_dir():
            raise UserError(f"--output: {str(target)!r} is a folder; give a file, such as {str(target / NAME)!r}")
        folder, name = Folder(target.parent), target.name
    try:
        folder.write(name, inspection_page(inspection, cfg))
    except STORAGE_ERRORS as error:
        where = str(inside(folder.where, name))
        raise UserError(f"{where!r} can't be written: {reason(error)}; give another file with --output") from error
    return inside(folder.where, name)


def inspection_page(inspection: Inspection, cfg: RunConfig) -> str:
    """Render the page of an inspection as self-contained HTML."""
    prepared = inspection.prepared
    sections = [
        _findings(inspection),
        _distributions(inspection),
        *_strange_sections(inspection, cfg),
        Section(
            "files", "Columns of every row", "Parquet files, with a row for every row of the data.", facts=_files(inspection)
        ),
    ]
    facts = [
        Fact("training rows", f"{prepared.train_rows:,}"),
        Fact("evaluation rows", f"{prepared.eval_rows:,}"),
        Fact("findings", f"{len(inspection.findings)}"),
        Fact("reference's scores", "none" if inspection.scores is None else inspection.scores.fingerprint),
    ]
    return render(Page("Inspection of prepared data", f"{prepared.path}, for {cfg.rl} of {cfg.base_model}.", facts, sections))


def inspected_section(cfg: RunConfig, prepared: Prepared, scores: str | None) -> list[Section]:
    """Return a section with what `prefray inspect` has found in a run's data; none if it hasn't looked at them.

    Args:
        cfg: the run's recipe.
        prepared: its data.
        scores: fingerprint of the run's scores, if it has any.

    Raises:
        OSError: when its file can't be read; UserError when it isn't what was written.
    """
    folder = measures_folder(cfg, prepared, scores)
    if (text := folder.read(FINDINGS)) is None:
        return []
    findings = [read_finding(value) for value in json.loads(text)["findings"]]
    words = (
        f"By `prefray inspect`; {inside(folder.where, NAME)} has the rows." if findings else f"`prefray inspect`: {NOTHING}."
    )
    return [Section("inspection", "Findings in the data", words, notices=[notice(finding) for finding in findings])]


def _findings(inspection: Inspection) -> Section:
    notices = [notice(finding) for finding in inspection.findings]
    if not is_wrong(inspection.findings):
        notices.insert(0, Notice("healthy", f"{NOTHING}."))
    missing = [Fact("not looked at", reason) for reason in inspection.missing]
    return Section("findings", "Findings", notices=notices, facts=missing)


def _distributions(inspection: Inspection) -> Section:
    names = [name for name in inspection.table.columns if name not in NOT_DRAWN]
    charts = [_histogram(inspection.table, name) for name in names if inspection.table[name].nunique() > 1]
    rows = [Row([name, _meaning(name), *map(_number, values.values())]) for name, values in inspection.quantiles().items()]
    columns = [Column("column", is_text=True), Column("what it is", is_text=True), *map(Column, QUANTILES)]
    words = "What every row has. A recipe's select section takes training rows by any of these columns but tokens and overlap."
    return Section("columns", "Distributions", words, charts=charts, table=Table(columns, rows))


def _histogram(table: pd.DataFrame, name: str) -> Chart:
    values = table[name].to_numpy(dtype=np.float64)
    low, high = np.quantile(values, [TAIL, 1 - TAIL])
    is_whole = bool((values == np.round(values)).all())
    # Of few whole numbers each has its own bar.
    bars = int(high - low) + 1 if is_whole and high - low < BINS else BINS
    margin = 0.5 if bars < BINS or high == low else 0.0
    edges = np.linspace(low - margin, high + margin, bars + 1)
    figure = go.Figure()
    for index, split in enumerate((TRAIN, EVAL)):
        own = values[(table["split"] == split).to_numpy()]
        if len(own):
            # Clipped, so that a few extreme rows don't squeeze all others into one bar.
            counts, _ = np.histogram(np.clip(own, edges[0], edges[-1]), edges)
            centres = (edges[1:] + edges[:-1]) / 2
            figure.add_bar(x=centres, y=counts / len(own), name=split, marker={"color": COLOURS[index]}, opacity=0.7)
    figure.update_layout(barmode="overlay", bargap=0, showlegend=True)
    figure.update_xaxes(title=name)
    figure.update_yaxes(title="share of the split's rows", rangemode="tozero")
    return chart(figure, name, height=280)


def _meaning(name: str) -> str:
    return ROW_COLUMNS[name].description if name in ROW_COLUMNS else MEANING.get(name, "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def _strange_sections(inspection: Inspection, cfg: RunConfig) -> Iterator[Section]:
    tokenizer = load_tokenizer(cfg)
    answers = COMPLETIONS[inspection.prepared.manifest["kind"]]
    for kind in strangest(inspection.table):
        positions = kind.rows.index.to_list()
        texts = _texts(inspection, positions, ["prompt", *answers])
        comparisons = [
            _comparison(row, texts[position], kind, tokenizer)
            for position, (_, row) in zip(positions, kind.rows.iterrows(), strict=True)
        ]
        words = f"{len(comparisons)} rows, by {kind.column}, with the text that is trained on, its control tokens included."
        yield Section(f"strange-{kind.name}", kind.title, words, comparisons=comparisons, is_folded=True)


def _texts(inspection: Inspection, positions: list[int], names: list[str]) -> dict[int, dict[str, Any]]:
    """Read the token ids of rows by their positions in the table; only parts that hold any are read."""
    found: dict[int, dict[str, Any]] = {}
    start = 0
    for part, rows in parts_of(inspection.prepared).items():
        here = [position for position in positions if start <= position < start + rows]
        if here:
            ids = [f"{name}_ids" for name in names]
            table = inspection.prepared.read_part(part, ["source", "row_number", *ids])
            taken = table.take([position - start for position in here]).to_pylist()
            found |= dict(zip(here, taken, strict=True))
        start += rows
    return found


def _comparison(row: pd.Series, ids: dict[str, Any], kind: StrangeRows, tokenizer: Any) -> Comparison:
    origin = f"{row['split']} row {row['row_id']} ({ids['source']} row {ids['row_number']})"
    label = f"{origin}, {kind.column} {_number(row[kind.column])}"
    names = [name.removesuffix("_ids") for name in ids if name.endswith("_ids")]
    # Decoded, not the row's own text: that is what the model reads, cut where the row was cut.
    texts = {name: tokenizer.decode(ids[f"{name}_ids"]) for name in names}
    answers = [Message(f"{name}, {len(ids[f'{name}_ids'])} tokens", text) for name, text in texts.items() if name != "prompt"]
    return Comparison(Message(label, texts["prompt"]), answers)


def _files(inspection: Inspection) -> list[Fact]:
    return [Fact(", ".join(columns.read(TRAIN).column_names[1:]), str(columns.path)) for columns in inspection.columns]
