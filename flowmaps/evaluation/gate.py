"""Scores as a gate in CI: limits, a comparison with an earlier record, and reports that CI systems read."""

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmaps.errors import UserError
from flowmaps.evaluation.evaluate import Row, table
from flowmaps.files import write_file

Record = dict[str, Any]
# What two records must agree in before their distances can be compared; what a row is known by.
PROTOCOL = ("metric", "extractor", "num", "seeds", "label", "guidance", "gamma")
WAY = ("ema", "sampler", "grid", "steps")


@dataclass(frozen=True)
class Verdict:
    """Of one row: what it is, its distance, and why it fails the gate, if it does."""

    name: str
    value: float
    reasons: tuple[str, ...] = ()


def read_record(file: str, flag: str) -> Record:
    """A record with distances that ``fid.py --json`` wrote; refused in the words of ``flag``."""
    try:
        found: Record = json.loads(Path(file).read_bytes())
        _ = {fact: found[fact] for fact in PROTOCOL}, [row[found["metric"]] + 0.0 for row in found["results"]]
        _ = [found["reference"][known] for known in ("content", "sha256")]
    except OSError as error:
        raise UserError(f"{flag}: {error.strerror}: give a file that fid.py --json wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag} is no record of fid.py --json ({error!r}): write it again") from None
    return found


@dataclass(frozen=True)
class Limits:
    """What fails a row: a distance above ``max_fid``, or (1 + ``tolerance``) times that in the record ``file``."""

    max_fid: float | None = None
    file: str = ""
    tolerance: float = 0.0
    baseline: Record | None = None

    @classmethod
    def read(cls, max_fid: float | None, file: str | None, tolerance: float) -> "Limits":
        """With the record ``file`` of ``fid.py --json``, if there is to be a comparison."""
        if not file:
            return cls(max_fid)
        return cls(max_fid, file, tolerance, read_record(file, f"--max_regression={file}"))

    def check(self, report: Record, rows: Iterable[Row]) -> None:
        """Refuse a baseline that means something else than ``report``, or lacks one of ``rows``."""
        if self.baseline is None:
            return
        for fact in PROTOCOL:
            if report[fact] != self.baseline[fact]:
                raise UserError(
                    f"--max_regression={self.file} was made with another {fact} ({self.baseline[fact]}, now "
                    f"{report[fact]}): make it again, or score as it was made"
                )
        ours, theirs = report["reference"], self.baseline["reference"]
        known = "content" if ours["content"] and theirs["content"] else "sha256"
        if ours[known] != theirs[known]:
            raise UserError(f"--max_regression={self.file} was made with another --reference: make it again")
        for row in rows:
            self.before(row, report["metric"])

    def before(self, row: Row, metric: str) -> float:
        """The distance that the baseline has where ``row`` is."""
        assert self.baseline is not None
        for old in self.baseline["results"]:
            if _way(old) == _way(row):
                return float(old[metric])
        raise UserError(f"--max_regression={self.file} has no row for {name(row)}: make it again")

    def judge(self, report: Record) -> list[Verdict]:
        """A verdict on each row of ``report``."""
        metric, verdicts = report["metric"], []
        for row in report["results"]:
            value, reasons = row[metric], []
            if self.max_fid is not None and not value <= self.max_fid:
                reasons.append(f"{metric} {value:.4g} is above --max_fid={self.max_fid:g}")
            if self.baseline is not None and not value <= (1 + self.tolerance) * (before := self.before(row, metric)):
                reasons.append(
                    f"{metric} {value:.4g} is more than --tolerance={self.tolerance:g} above the {before:.4g} of "
                    f"--max_regression={self.file}"
                )
            verdicts.append(Verdict(name(row), value, tuple(reasons)))
        return verdicts


def failures(verdicts: Iterable[Verdict]) -> list[str]:
    """What failed, a line a reason."""
    return [f"{reason} ({verdict.name})" for verdict in verdicts for reason in verdict.reasons]


def _way(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in WAY)


def name(row: Row) -> str:
    """What a row of results is, in words."""
    if "steps" not in row:
        return "the samples"
    average = "" if row["ema"] is None else f", ema {row['ema']:g}"
    return f"{row['sampler']}, {row['steps']} step{'s' * (row['steps'] > 1)}, {row['grid']}{average}"


def conclude(report: Record, limits: Limits, json_file: str | None, junit_file: str | None, page: str | None) -> int:
    """Print and write what was found; the exit code. ``page``: a Markdown file to add to."""
    print(table(report["results"]))
    verdicts = limits.judge(report)
    if json_file:
        write_file(Path(json_file), json.dumps(report, indent=2).encode())
    if junit_file:
        write_file(Path(junit_file), junit(report, verdicts))
    if page:
        with Path(page).open("a") as file:
            file.write(summary(report, verdicts))
    failed = failures(verdicts)
    if failed:
        print(f"gate failed: {'; '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def junit(report: Record, verdicts: list[Verdict]) -> bytes:
    """The verdicts as JUnit XML, a test case a row; facts of the record as properties."""
    failed = sum(bool(verdict.reasons) for verdict in verdicts)
    counts = {"tests": str(len(verdicts)), "failures": str(failed), "errors": "0"}
    root = ET.Element("testsuites", counts)
    suite = ET.SubElement(root, "testsuite", {"name": "flowmaps fid.py", **counts})
    properties = ET.SubElement(suite, "properties")
    for key, value in _facts(report).items():
        ET.SubElement(properties, "property", name=key, value=str(value))
    for verdict in verdicts:
        case = ET.SubElement(suite, "testcase", classname=str(report["source"]), name=verdict.name)
        for reason in verdict.reasons:
            ET.SubElement(case, "failure", message=reason).text = reason
        ET.SubElement(case, "system-out").text = f"{report['metric']} {verdict.value!r}"
    ET.indent(root)
    document: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return document


def summary(report: Record, verdicts: list[Verdict]) -> str:
    """The verdicts as Markdown, for a CI system's page."""
    failed = failures(verdicts)
    facts = "\n".join(f"- {key}: {value}" for key, value in _facts(report).items())
    lines = "".join(f"- **{line}**\n" for line in failed)
    title = f"{report['metric']} of {report['source']}: {'failed' if failed else 'passed'}"
    return f"### {title}\n\n{lines}\n{table(report['results'])}\n\n{facts}\n\n"


def _facts(report: Record) -> dict[str, Any]:
    reference, extractor = report["reference"], report["extractor"]
    return {
        "reference": f"{reference['data']} {reference['split']}".strip(),
        "reference images": reference["n"] if reference["n"] is not None else "not told",
        "extractor": f"{extractor['extractor']} {extractor['weights'][:12]}",
        "images": report["num"],
        "seeds": report["seeds"],
        "images seen in training": report["model"].get("images_seen"),
        "flowmaps": report["versions"]["flowmaps"],
        "torch": report["versions"]["torch"],
        "device": report["device"],
    }
