"""Prepared data on a run's page: counts, rejection reasons and lengths of rows."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from pipeline.config import RunConfig
from pipeline.data.row_kinds import COMPLETIONS
from pipeline.data.store import COUNTS, REJECTED, Prepared, open_store, prepared_root
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import inside, locate, reason
from pipeline.report.inspection import inspected_section
from pipeline.report.page import COLOURS, DASHES, Chart, Column, Row, Section, Table, chart
from pipeline.report.pictures import picture_sections
from strategies.batch.plan import BatchPlan, packed_tokens

__all__ = ["Rows"]

MOST_BINS = 40
REASONS = 20
"""Most kinds of rejection reasons that are listed."""
GIVEN = re.compile(r"\([^()]*\)|'[^']*'|\"[^\"]*\"|\d+")
"""Parts of a reason that vary from row to row, ignored when reasons are counted."""


@dataclass(frozen=True)
class Rows:
    """Sections about a run's prepared data."""

    sections: tuple[Section, ...]
    tokens_saved: str | None = None
    """Effect of packing, as text; None if rows can't be packed, or the data are missing."""

    @classmethod
    def of(cls, cfg: RunConfig, fingerprint: str | None, scores: str | None = None) -> Rows:
        """Read a run's store; a missing or unreadable one becomes a note on the page.

        Args:
            fingerprint: of the prepared data, if known.
            scores: of the reference's scores, if there are any.
        """
        if fingerprint is None:
            return cls((Section("data", "Data", "No data had been prepared when the run ended."),))
        folder = inside(locate(cfg.dataset_prepared_path), fingerprint)
        try:
            # Unverified: a page about an old run must not read gigabytes, nor fail for a damaged file.
            store = open_store(prepared_root(cfg.dataset_prepared_path).subfolder(fingerprint), verify=False)
            if store is None:
                gone = f"The prepared data aren't in {folder} here: they were deleted, or are on another machine."
                return cls((Section("data", "Data", gone),))
            return cls((*_sections(store), *inspected_section(cfg, store, scores)), _saved(store, cfg))
        except (*STORAGE_ERRORS, ValueError, KeyError) as error:
            return cls((Section("data", "Data", f"The prepared data in {folder} can't be read: {reason(error)}"),))


def _sections(store: Prepared) -> list[Section]:
    columns = [Column("source", is_text=True), *(Column(name.replace("_", " ")) for name in COUNTS)]
    rows = [Row([source["path"], *(f"{source[name]:,}" for name in COUNTS)]) for source in store.manifest["sources"]]
    words = f"{store.train_rows:,} rows to train on and {store.eval_rows:,} to evaluate on, prepared in {store.path}."
    sections = [Section("data", "Data", words, charts=[_lengths(store)], table=Table(columns, rows)), *picture_sections(store)]
    if notes := store.notes:
        words = "What preparing the rows brought up, each with an example and what would change it."
        table = Table([Column("note", is_text=True)], [Row([note]) for note in notes])
        sections.append(Section("data-notes", "Notes on the data", words, table=table))
    if store.rejected_rows:
        sections.append(_rejected(store))
    return sections


def _names(store: Prepared) -> list[str]:
    return ["prompt", *COMPLETIONS[store.manifest["kind"]]]


def _lengths(store: Prepared) -> Chart:
    """Plot histograms of the lengths of training rows, one line per text of a row."""
    names = _names(store)
    table = store.read("train", [f"{name}_length" for name in names])
    figure = go.Figure()
    most = max(int(table[f"{name}_length"].to_numpy().max()) for name in names)
    bins = min(MOST_BINS, 8 + int(len(table) ** 0.5))
    # Token counts are whole numbers; of short rows, several rounded edges coincide.
    edges = np.unique(np.linspace(0, most + 1, bins + 1).round())
    for index, name in enumerate(names):
        counts, _ = np.histogram(table[f"{name}_length"].to_numpy(), edges)
        line: dict[str, Any] = {"shape": "hv", "dash": DASHES[index], "color": COLOURS[index], "width": 2}
        # One edge more than counts: the last step needs an end.
        figure.add_scatter(x=edges, y=[*counts, counts[-1]], name=name, mode="lines", line=line)
    figure.update_xaxes(title="tokens")
    figure.update_yaxes(title="training rows", rangemode="tozero")
    figure.update_layout(showlegend=True)
    return chart(figure, "Length of training rows", wide=True, height=320)


def _rejected(store: Prepared) -> Section:
    reasons = store.read(REJECTED, ["reason"])["reason"].to_pylist()
    first: dict[str, str] = {}
    counts = Counter(GIVEN.sub("…", text) for text in reasons)
    for text in reasons:
        first.setdefault(GIVEN.sub("…", text), text)
    rows = [Row([f"{number:,}", first[kind]]) for kind, number in counts.most_common(REASONS)]
    words = f"{store.rejected_rows:,} rows couldn't be used; they are in {inside(store.path, REJECTED)}, each with its text. "
    words += "Reasons that differ only in what a row holds are counted together, and the first of them is shown."
    if len(counts) > REASONS:
        words += f" {len(counts) - REASONS} rarer kinds of reasons are left out."
    return Section("rejected", "Rejected rows", words, table=Table([Column("rows"), Column("reason", is_text=True)], rows))


def _saved(store: Prepared, cfg: RunConfig) -> str | None:
    """Compare the tokens of an epoch as packed rows and as padded batches of the same pairs."""
    names = _names(store)
    if store.manifest["kind"] != "pair" or not store.train_rows:
        return None
    table = store.read("train", [f"{name}_length" for name in names])
    lengths = np.stack([table[f"{name}_length"].to_numpy() for name in names], axis=1).astype(np.int64)
    packed = int(packed_tokens(lengths, cfg.sequence_len).sum())
    # In the order of training's first epoch: padding depends on which rows share a batch.
    order = BatchPlan(len(lengths), cfg.micro_batch_size, cfg.seed).order(0)
    whole = np.minimum(lengths[:, 0] + lengths[:, 1:].max(axis=1), cfg.sequence_len)[order]
    # A padded batch costs twice (chosen, rejected) its longest row per pair.
    starts = np.arange(0, len(whole), cfg.micro_batch_size)
    sizes = np.diff([*starts, len(whole)])
    padded = int((2 * sizes * np.maximum.reduceat(whole, starts)).sum())
    beside = f"padded batches of {cfg.micro_batch_size} pairs hold {padded:,}, {padded / packed:.1f} times as many"
    return f"{packed:,} tokens an epoch; {beside}"
