"""What is found when a data set is verified, as a table for people and as JSON for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import RenderableType

Severity = Literal["error", "warning", "information"]


@dataclass(frozen=True)
class Finding:
    """One thing that was found: how bad it is, what, where, and what to do about it."""

    severity: Severity
    what: str
    where: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All that was found, the worst first, and the images and captions of each split."""

    name: str
    findings: tuple[Finding, ...]
    counts: dict[str, dict[str, int]]

    @property
    def ok(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        findings = [asdict(finding) for finding in self.findings]
        return {"name": self.name, "ok": self.ok, "counts": self.counts, "findings": findings}

    def table(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("", "what", "where", "what to do")
        for finding in self.findings:
            table.add_row(finding.severity, *(Text(text) for text in (finding.what, finding.where, finding.remedy)))
        counts = "; ".join(
            f"{split}: {count['images']:,} images, {count['captions']:,} captions"
            for split, count in self.counts.items()
        )
        verdict = "no mistakes" if self.ok else "has mistakes"
        return Group(Text(f"{self.name}: {verdict}. {counts}"), table)
