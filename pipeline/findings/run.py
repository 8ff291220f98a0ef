"""Findings of a run, from the files of its folder, and `findings.json` in it."""

from __future__ import annotations

import json
from typing import Any

from pipeline.config import RunConfig, parse_saved
from pipeline.findings.curves import Curves
from pipeline.findings.facts import RunFacts, read_facts
from pipeline.findings.rules import RULES
from pipeline.runs.folder import CONFIG, FINDINGS, RunFolder
from pipeline.runs.metrics import MetricsFile
from pipeline.ui.findings import Finding, by_severity

__all__ = ["apply_rules", "find_in_records", "find_in_run", "training_records", "write_findings"]


def write_findings(folder: RunFolder) -> None:
    """Write `findings.json` of a run; errors are those of `find_in_run`."""
    findings = [finding.as_json() for finding in find_in_run(folder)]
    recorded = training_records(MetricsFile(folder.metrics).read())
    content = {"rules": len(RULES), "training_records": recorded, "findings": findings}
    folder.storage.write(FINDINGS, json.dumps(content, indent=2) + "\n")


def training_records(records: list[dict[str, Any]]) -> int:
    """Return how many records of training steps have a finite loss."""
    return len(Curves(records)["loss"])


def find_in_run(folder: RunFolder) -> tuple[Finding, ...]:
    """Read a run's folder and apply all rules, errors first.

    Raises:
        UserError: when `run.json`, `config.yaml` or `metrics.jsonl` is missing or broken.
        OSError, pyarrow.ArrowException, NotImplementedError: when storage fails.
    """
    cfg = parse_saved(folder.storage.read(CONFIG) or "", str(folder.config))
    return find_in_records(folder, cfg, folder.state() or {}, MetricsFile(folder.metrics).read())


def find_in_records(
    folder: RunFolder, cfg: RunConfig, state: dict[str, Any], records: list[dict[str, Any]]
) -> tuple[Finding, ...]:
    """Apply all rules to a run whose files were read before; arguments are those of `read_facts`."""
    return apply_rules(read_facts(folder, cfg, state, records))


def apply_rules(run: RunFacts) -> tuple[Finding, ...]:
    """Return the findings of all rules, errors first."""
    return by_severity(finding for rule in RULES if (finding := rule.find(run)) is not None)
