"""The gate for CI: limits, a comparison with an earlier record, and reports that CI systems read."""

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmaps.errors import UserError, blame
from flowmaps.evaluation.record import Record, Row, table
from flowmaps.files import WRITER, WRITTEN_BY, write_file, write_json

# What two records must agree in before their distances can be compared, and what identifies a row.
PROTOCOL = ("metric", "extractor", "num", "seeds", "label", "guidance", "gamma")
ROW_KEY = ("ema", "sampler", "grid", "steps")


@dataclass(frozen=True)
class Verdict:
    """The name of a row, its distance, and the reasons why it fails the gate, if it does."""

    name: str
    value: float
    reasons: tuple[str, ...] = ()


def read_record(file: str | Path) -> Record:
    """Read a record with distances that ``fid.py --json`` wrote.

    Raises:
        UserError: The file is missing or is something else.
    """
    try:
        found: Record = json.loads(Path(file).read_bytes())
        _ = {fact: found[fact] for fact in PROTOCOL}, [row[found["metric"]] + 0.0 for row in found["results"]]
        _ = [found["reference"][known] for known in ("content", "sha256")]
    except OSError as error:
        reason = f"{error.strerror}: give a file that fid.py --json wrote"
        raise UserError(reason, field="record", value=file) from None
    except (ValueError, KeyError, TypeError) as error:
        reason = f"not a record of fid.py --json ({error!r}): write it again"
        raise UserError(reason, field="record", value=file) from None
    return found


@dataclass(frozen=True)
class Limits:
    """The limits of a distance: ``max_fid``, and (1 + ``tolerance``) times the distance in the record ``file``."""

    max_fid: float | None = None
    file: str = ""
    tolerance: float = 0.0
    baseline: Record | None = None

    @classmethod
    def read(cls, max_fid: float | None, file: str | None, tolerance: float) -> "Limits":
        """Make limits from an upper bound and the record ``file`` of ``fid.py --json``, both optional."""
        if not file:
            return cls(max_fid)
        with blame("max_regression", file):
            return cls(max_fid, file, tolerance, read_record(file))

    def check(self, report: Record) -> None:
        """Refuse a baseline that is not comparable with ``report``, whose rows need no scores yet, or lacks a row."""
        if self.baseline is None:
            return
        for fact in PROTOCOL:
            if report[fact] != self.baseline[fact]:
                raise self._refusal(
                    f"was made with another {fact} ({self.baseline[fact]}, now {report[fact]}): make it again, or "
                    "score as it was made"
                )
        ours, theirs = report["reference"], self.baseline["reference"]
        known = "content" if ours["content"] and theirs["content"] else "sha256"
        if ours[known] != theirs[known]:
            raise self._refusal("was made with another reference: make it again")
        for row in report["results"]:
            self.baseline_value(row, report["metric"])

    def _refusal(self, reason: str) -> UserError:
        return UserError(reason, field="max_regression", value=self.file)

    def baseline_value(self, row: Row, metric: str) -> float:
        """Return the distance of the baseline's row with the same key as ``row``."""
        assert self.baseline is not None
        for old in self.baseline["results"]:
            if _key(old) == _key(row):
                return float(old[metric])
        raise self._refusal(f"has no row for {name(row)}: make it again")

    def judge(self, report: Record) -> list[Verdict]:
        """Return a verdict on each row of ``report``."""
        metric, verdicts = report["metric"], []
        for row in report["results"]:
            value, reasons = row[metric], []
            if self.max_fid is not None and not value <= self.max_fid:
                reasons.append(f"{metric} {value:.4g} is above max_fid={self.max_fid:g}")
            if self.baseline is not None:
                before = self.baseline_value(row, metric)
                if not value <= (1 + self.tolerance) * before:  # NaN fails too
                    reasons.append(
                        f"{metric} {value:.4g} is more than tolerance={self.tolerance:g} above the {before:.4g} of "
                        f"max_regression={self.file}"
                    )
            verdicts.append(Verdict(name(row), value, tuple(reasons)))
        return verdicts


def failures(verdicts: Iterable[Verdict]) -> list[str]:
    """Return one line per reason to fail."""
    return [f"{reason} ({verdict.name})" for verdict in verdicts for reason in verdict.reasons]


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ROW_KEY)


def name(row: Row) -> str:
    """Describe a row of results in words."""
    if "steps" not in row:
        return "the samples"
    average = "" if row["ema"] is None else f", ema {row['ema']:g}"
    return f"{row['sampler']}, {row['steps']} step{'s' * (row['steps'] > 1)}, {row['grid']}{average}"


def finish(report: Record, limits: Limits, json_file: str | None, junit_file: str | None, page: str | None) -> int:
    """Print the results, write the files and return the exit code; the Markdown file ``page`` is appended to."""
    verdicts = limits.judge(report)
    if json_file:
        write_json(Path(json_file), report)
    if junit_file:
        write_file(Path(junit_file), junit(report, verdicts))
    if page:
        with Path(page).open("a") as file:
            file.write(summary(report, verdicts))
    print(table(report["results"]))  # once everything is on the disk
    failed = failures(verdicts)
    if failed:
        print(f"gate failed: {'; '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def junit(report: Record, verdicts: list[Verdict]) -> bytes:
    """Return the verdicts as JUnit XML: one test case per row, facts of the record as properties."""
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
        for reason in verdict.reasons:
            ET.SubElement(case, "failure", message=reason).text = reason
        ET.SubElement(case, "system-out").text = f"{report['metric']} {verdict.value!r}"
    ET.indent(root)
    document: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return document


def summary(report: Record, verdicts: list[Verdict]) -> str:
    """Return the verdicts as Markdown, for a CI system's page."""
    failed = failures(verdicts)
    facts = "\n".join(f"- {key}: {value}" for key, value in _facts(report).items())
    lines = "".join(f"- **{line}**\n" for line in failed)
    title = f"{report['metric']} of {report['source']}: {'failed' if failed else 'passed'}"
    return f"### {title}\n\n{lines}\n{table(report['results'])}\n\n{facts}\n\n"


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
    }
