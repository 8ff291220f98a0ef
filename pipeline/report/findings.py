"""Findings on a run's page, first of all sections."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.findings.rules import RULES
from pipeline.report.page import Fact, Notice, Section
from pipeline.ui.findings import NOTHING_RECORDED, Finding, healthy_text, is_wrong

__all__ = ["findings_section", "notice"]


def findings_section(findings: Sequence[Finding], is_finished: bool, records: int) -> Section:
    """Return the section of a run's findings, of so many records of training."""
    notices = [notice(finding) for finding in findings]
    if not is_wrong(findings) and not records:
        notices.insert(0, Notice("info", f"{NOTHING_RECORDED}."))
    elif not is_wrong(findings):
        text = healthy_text(len(RULES)).removeprefix("healthy: ")
        so_far = "" if is_finished else ", in the records so far"
        notices.insert(0, Notice("healthy", f"{text}{so_far}."))
    return Section("findings", "Findings", notices=notices)


def notice(finding: Finding) -> Notice:
    """Return a finding as it stands on a page."""
    return Notice(finding.severity, finding.sentence, [Fact("seen", finding.evidence_text), Fact("try", finding.advice)])
