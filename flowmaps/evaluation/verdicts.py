"""Verdicts on the rows of a record, and the reports of them that CI systems and people read."""

import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from flowmaps.evaluation.record import Record, Row, table
from flowmaps.files import WRITER, WRITTEN_BY
from flowmaps.markdown import markdown_table
from flowmaps.metrics.influence import SMALLEST_ERROR, paired_error


@dataclass(frozen=True)
class Verdict:
    """The name of a row, its distance, the reasons why it fails the gate, if it does, and how it compares."""

    name: str
    metric: str
    value: float
    reasons: tuple[str, ...] = ()
    comparison: str = ""  # with the baseline's row
    difference: "Difference | None" = None


@dataclass(frozen=True)
class Difference:
    """A distance, that of the baseline, and the standard error of their difference, None if it is not known."""

    value: float
    before: float
    se: float | None

    @classmethod
    def of(cls, row: Row, old: Row, metric: str) -> "Difference":
        """Compare two rows, block by block if both have the influence of their samples."""
        value, before = float(row[metric]), float(old[metric])
        now, then = (entry.get("influence", {}).get(metric) for entry in (row, old))
        if not now or not then:
            return cls(value, before, None)
        return cls(value, before, max(paired_error(then, now), SMALLEST_ERROR * before))

    def is_worse(self, confidence: float) -> bool:
        """Tell whether the distance has grown, by more than chance explains if the standard error is known."""
        if self.se is None:
            return not self.value <= self.before
        return not self.value - self.before <= NormalDist().inv_cdf(confidence) * self.se  # NaN is worse

    def __str__(self) -> str:
        change = self.value - self.before
        error = "" if self.se is None else f" ± {self.se:.2g}"
        share = f" ({change / self.before:+.1%})" if self.before else ""
        return f"baseline {self.before:.4g}, difference {change:+.3g}{error}{share}"


def failures(verdicts: Iterable[Verdict]) -> list[str]:
    """Return one line per reason to fail."""
    return [f"{reason} ({verdict.name})" for verdict in verdicts for reason in verdict.reasons]


def name(row: Row) -> str:
    """Describe a row of results in words."""
    if "steps" not in row:
        return "the samples"
    average = "" if row["ema"] is None else f", ema {row['ema']:g}"
    return f"{row['sampler']}, {row['steps']} step{'s' * (row['steps'] > 1)}, {row['grid']}{average}"


def junit(report: Record, verdicts: list[Verdict]) -> bytes:
    """Return the verdicts as JUnit XML: a test case per distance of a row, facts of the record as properties."""
    failed = sum(bool(verdict.reasons) for verdict in verdicts)
    counts = {"tests": str(len(verdicts)), "failures": str(failed), "errors": "0"}
    root = ET.Element("testsuites", counts)
    root.append(ET.Comment(f"{WRITTEN_BY}: {WRITER}"))
    suite = ET.SubElement(root, "testsuite", {"name": "flowmaps fid.py", **counts})
    properties = ET.SubElement(suite, "properties")
    for key, value in _facts(report).items():
        ET.SubElement(properties, "property", name=key, value=str(value))
    for verdict in verdicts:
        case = ET.SubElement(suite, "testcase", classname=str(report["source"]), name=verdict.name)
        if verdict.reasons:
            reason = "; ".join(verdict.reasons)
            ET.SubElement(case, "failure", message=reason).text = reason
        ET.SubElement(case, "system-out").text = f"{verdict.metric} {verdict.value!r} {verdict.comparison}".strip()
    ET.indent(root)
    document: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return document


def summary(report: Record, verdicts: list[Verdict]) -> str:
    """Return the verdicts as Markdown, for a CI system's page."""
    failed = failures(verdicts)
    facts = "\n".join(f"- {key}: {value}" for key, value in _facts(report).items())
    lines = "".join(f"- **{line}**\n" for line in failed)
    lines += "".join(f"- {verdict.name}: {verdict.comparison}\n" for verdict in verdicts if verdict.comparison)
    title = f"{report['metric']} of {report['source']}: {'failed' if failed else 'passed'}"
    parts = [f"### {title}", lines.rstrip(), before_and_after(verdicts), table(report["results"]), facts]
    return "\n\n".join(part for part in parts if part) + "\n\n"


def before_and_after(verdicts: list[Verdict]) -> str:
    """Return a table with each distance of the baseline and now; empty without a baseline."""
    rows = []
    for verdict in verdicts:
        if (found := verdict.difference) is not None:
            change = f"{found.value - found.before:+.3g}" + ("" if found.se is None else f" ± {found.se:.2g}")
            share = f"{found.value / found.before - 1:+.1%}" if found.before else ""
            cells = [f"{found.before:.4g}", f"{found.value:.4g}", change, share]
            rows.append([verdict.name, verdict.metric, *cells, "failed" if verdict.reasons else "passed"])
    columns = ["row", "distance", "before", "after", "difference ± standard error", "", "verdict"]
    return markdown_table(columns, rows) if rows else ""


def _facts(report: Record) -> dict[str, Any]:
    reference, extractor = report["reference"], report["extractor"]
    return {
        "reference": f"{reference['data']} {reference['split']}".strip(),
        "reference images": reference["n"] if reference["n"] is not None else "unknown",
        "extractor": f"{extractor['extractor']} {extractor['weights'][:12]}",
        "images": report["num"],
        "seeds": report["seeds"],
        "images seen in training": report["model"].get("images_seen"),
        "flowmaps": report["versions"]["flowmaps"],
        "torch": report["versions"]["torch"],
        "device": report["device"],
        "command": f"`{report['command']}`",
    }
