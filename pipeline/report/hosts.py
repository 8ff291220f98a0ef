"""Section of a sweep's page on its hosts: which trial had which slot, and how well the slots were used."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import plotly.graph_objects as go

from pipeline.report.page import COLOURS, Chart, Column, Row, Section, Table, chart
from pipeline.tuning.records import Stay, TrialRecord
from pipeline.tuning.shared_stages import SharedStages, most_at_once, seconds_of
from pipeline.tuning.table import own_workers

__all__ = ["hosts_section"]

OWN = "own workers"
PATTERNS = ("", "/", "x", ".", "+", "-")


class Bar(NamedTuple):
    """A stay in the chart."""

    row: str
    stay: Stay
    record: TrialRecord


def hosts_section(records: Sequence[TrialRecord], shared: SharedStages) -> Section:
    """Show slots over time, and a table of hosts.

    Args:
        records: of all trials.
        shared: the base that trials share.
    """
    stays = [(stay, record) for record in records for stay in record.stays]
    each = shared.slots // shared.copies if shared.copies else 0
    words = [
        f"Trials that share the base model train in slots of a host, {each} on each. A bar is a trial's time in a slot; where "
        "a row has none, the slot was free, or the host had ended for want of trials.",
        *(f"{line[0].upper()}{line[1:]}." for line in own_workers(records)),
    ]
    return Section("hosts", "Hosts and slots", " ".join(words), [_chart(_bars(stays, each))], table=_table(stays, each))


def _bars(stays: Sequence[tuple[Stay, TrialRecord]], each: int) -> list[Bar]:
    """Put each stay into the first slot of its host that is free then."""
    until: dict[tuple[str, int], float] = {}
    bars = []
    for stay, record in sorted(stays, key=lambda item: item[0].began):
        host, slot = _host(stay), 0
        # One more than there are: a trial that has left is shown until Tune has its last result.
        while until.get((host, slot), 0.0) > stay.began and slot < max(each, 1):
            slot += 1
        until[host, slot] = _end(stay)
        bars.append(Bar(f"{host}, slot {slot}" if stay.host is not None else f"{host} {slot}", stay, record))
    return bars


def _chart(bars: Sequence[Bar]) -> Chart:
    """Draw the bars, one colour for each trial."""
    figure = go.Figure()
    for index, number in enumerate(sorted({bar.record.number for bar in bars})):
        ours = [bar for bar in bars if bar.record.number == number]
        figure.add_bar(
            y=[bar.row for bar in ours],
            base=[_time(bar.stay.began) for bar in ours],
            x=[1000 * _seconds(bar.stay) for bar in ours],
            orientation="h",
            name=f"trial {ours[0].record.name}",
            text=[str(number) for _ in ours],
            textposition="inside",
            insidetextanchor="middle",
            insidetextfont={"color": "#ffffff"},
            marker={
                "color": COLOURS[index % len(COLOURS)],
                "pattern": {"shape": PATTERNS[index // len(COLOURS) % len(PATTERNS)]},
            },
            hovertext=[f"trial {bar.record.name}, {_shown(_seconds(bar.stay))}" for bar in ours],
            hoverinfo="text",
        )
    rows = sorted({bar.row for bar in bars})
    # Else a bar would be put beside those of other trials.
    figure.update_layout(barmode="overlay", showlegend=False)
    figure.update_xaxes(type="date", title="time (UTC)")
    figure.update_yaxes(categoryorder="array", categoryarray=rows[::-1], automargin=True)
    return chart(figure, "Which trial had which slot", wide=True, height=130 + 30 * len(rows))


def _table(stays: Sequence[tuple[Stay, TrialRecord]], each: int) -> Table:
    """A row for each host, and one for workers of their own."""
    names = ("host", "trials", "most at once", "time with trials", "slots in use")
    rows = []
    for host in sorted({_host(stay) for stay, _ in stays}):
        here = [(stay, record) for stay, record in stays if _host(stay) == host]
        ours = [stay for stay, _ in here]
        numbers = sorted({record.number for _, record in here})
        seconds = seconds_of(ours)
        used = sum(map(_seconds, ours)) / (seconds * each) if seconds and each and host != OWN else None
        rows.append(
            Row(
                [
                    host,
                    ", ".join(map(str, numbers)),
                    str(most_at_once(ours)),
                    _shown(seconds),
                    "" if used is None else f"{min(used, 1.0):.0%}",
                ]
            )
        )
    return Table([Column(name, is_text=name in ("host", "trials")) for name in names], rows)


def _host(stay: Stay) -> str:
    return OWN if stay.host is None else f"host {stay.host}"


def _end(stay: Stay) -> float:
    return stay.began if stay.ended is None else stay.ended


def _seconds(stay: Stay) -> float:
    return _end(stay) - stay.began


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


def _shown(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
