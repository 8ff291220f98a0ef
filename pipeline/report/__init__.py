"""HTML reports of runs and sweeps: one self-contained file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from pipeline.report.run import run_page
    from pipeline.report.sweep import sweep_page
    from pipeline.report.write import write_report
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "pipeline.report.run": "run_page",
            "pipeline.report.sweep": "sweep_page",
            "pipeline.report.write": "write_report",
        },
    )

__all__ = ["run_page", "sweep_page", "write_report"]
