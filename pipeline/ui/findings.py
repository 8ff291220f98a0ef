"""Findings: what is wrong with a run or with data, in a plain sentence, with its evidence and what to try."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.text import Text

from pipeline.errors import UserError

__all__ = [
    "NOTHING_RECORDED",
    "Evidence",
    "Finding",
    "Severity",
    "by_severity",
    "finding_lines",
    "healthy_text",
    "is_wrong",
    "read_finding",
]

Severity = Literal["error", "warning", "info"]
ORDER: tuple[Severity, ...] = ("error", "warning", "info")
STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@dataclass(frozen=True)
class Evidence:
    """A number that a finding rests on."""

    what: str
    """What was measured, for example `rewards/chosen`."""
    value: float
    step: int | None = None
    """Step at which it was measured, if at one."""

    def __str__(self) -> str:
        number = f"{self.value:,.0f}" if float(self.value).is_integer() and abs(self.value) < 1e9 else f"{self.value:.4g}"
        return f"{self.what} {number}" + (f" (step {self.step:,})" if self.step is not None else "")


@dataclass(frozen=True)
class Finding:
    """Something that a user should know about a run or about data.

    Raises:
        ValueError: without evidence.
    """

    rule: str
    """Id of the rule that found it, for example `flat_loss`."""
    severity: Severity
    """error: the result can't be used as it is; warning: look at it; info: worth knowing."""
    sentence: str
    """What was found, as one plain sentence."""
    evidence: tuple[Evidence, ...]
    """The numbers that it rests on, each with its step."""
    advice: str
    """What to try, with the keys of the recipe."""
    rows: tuple[str, ...] = ()
    """Ids of rows that it names."""

    def __post_init__(self) -> None:
        if not self.evidence:
            raise ValueError(f"{self.rule}: a finding needs evidence")

    @property
    def evidence_text(self) -> str:
        """Evidence on one line."""
        rows = (f"rows {', '.join(self.rows)}",) if self.rows else ()
        return "; ".join([*map(str, self.evidence), *rows])

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {**asdict(self), "evidence": [asdict(one) for one in self.evidence], "rows": list(self.rows)}


def read_finding(value: Any) -> Finding:
    """Build a finding from what `as_json` returned.

    Raises:
        UserError: when it is none.
    """
    try:
        evidence = tuple(Evidence(**one) for one in value["evidence"])
        return Finding(**{**value, "evidence": evidence, "rows": tuple(value["rows"])})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"no finding, but {str(value)[:80]!r}; delete the file that holds it") from error


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sort findings, errors first; those of one severity keep their order."""
    return tuple(sorted(findings, key=lambda finding: ORDER.index(finding.severity)))


def is_wrong(findings: Iterable[Finding]) -> bool:
    """Return whether any finding is an error or a warning."""
    return any(finding.severity != "info" for finding in findings)


def healthy_text(rules: int) -> str:
    """Return the line that stands where none of so many rules found an error or a warning."""
    return f"healthy: none of {rules} rules found anything wrong"


NOTHING_RECORDED = "no training step is recorded, so whether the run is healthy can't be told; logging_steps: 1 records all"
"""Stands there instead where rules had no records of training to look at."""


def finding_lines(findings: Sequence[Finding], healthy: str = "no findings") -> Text:
    """Return findings as lines of a terminal: the sentence, its evidence, what to try.

    Args:
        findings: in the order in which they are shown.
        healthy: the line that precedes them where none is an error or a warning.
    """
    lines = [] if is_wrong(findings) else [Text(healthy, "yellow" if healthy == NOTHING_RECORDED else "green")]
    for finding in findings:
        head = Text.assemble((f"{finding.severity}: ", STYLES[finding.severity]), finding.sentence)
        lines.append(Text("\n").join([head, Text(f"  seen:  {finding.evidence_text}"), Text(f"  try:   {finding.advice}")]))
    return Text("\n").join(lines)
