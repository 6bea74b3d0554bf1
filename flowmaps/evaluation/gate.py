"""The gate for CI: limits, a comparison with an earlier record, and reports that CI systems read."""

import math
import os
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmaps.errors import UserError, blame
from flowmaps.evaluation.record import ROW_KEY, Record, Row, read_record, table
from flowmaps.files import WRITER, WRITTEN_BY, check_new_file, writable_directory, write_file, write_json

# What two records must agree in before their distances can be compared.
PROTOCOL = ("metric", "extractor", "num", "seeds", "label", "guidance", "guidance_interval", "gamma")


@dataclass(frozen=True)
class Verdict:
    """The name of a row, its distance, and the reasons why it fails the gate, if it does."""

    name: str
    value: float
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """The limits of a distance: ``max_fid``, and (1 + ``tolerance``) times the distance in the record ``file``.

    Raises:
        UserError: A limit is not a finite number of at least 0, or the record is that of a run that failed its gate.
    """

    max_fid: float | None = None
    file: str = ""
    tolerance: float = 0.0
    baseline: Record | None = None

    def __post_init__(self) -> None:
        for field, value in (("max_fid", self.max_fid), ("tolerance", self.tolerance)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError("must be a number of at least 0", field=field, value=value)
        if self.baseline is not None and self.baseline.get("failed"):
            raise self._refusal(
                f"was written by a run that failed its gate ({self.baseline['failed'][0]}): give the record that this "
                "run was compared with, or accept these scores by writing the record again without a limit"
            )

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
            if report[fact] != self.baseline.get(fact):
                raise self._refusal(
                    f"was made with another {fact} ({self.baseline.get(fact)}, now {report[fact]}): make it again, or "
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


def check_outputs(json_file: str | None, junit_file: str | None, page: str | None) -> None:
    """Refuse, before any work, files that ``finish`` could not write, or that are something else of flowmaps."""
    for field, file, is_kind in (("json", json_file, _is_record), ("junit", junit_file, _is_junit)):
        if file:
            with blame(field, file):
                target = check_new_file(Path(file))
                if target.exists() and target.stat().st_size and not is_kind(target):
                    raise UserError("is another kind of file that flowmaps wrote: choose another name")
    if page:
        writable_directory(Path(page).parent)  # it is appended to
        if Path(page).exists() and not (Path(page).is_file() and os.access(page, os.W_OK)):
            raise UserError(
                f"GITHUB_STEP_SUMMARY={page} is not a file that can be written: set it to another, or unset it"
            )


def _is_record(file: Path) -> bool:
    try:
        return bool(read_record(file))
    except UserError:
        return False


def _is_junit(file: Path) -> bool:
    return b"<testsuites" in file.read_bytes()[:1000]


def finish(report: Record, limits: Limits, json_file: str | None, junit_file: str | None, page: str | None) -> int:
    """Print the results, write the files and return the exit code; the Markdown file ``page`` is appended to."""
    verdicts = limits.judge(report)
    failed = failures(verdicts)
    if json_file:  # of a failed run too, but marked, so that it never becomes a baseline, whatever it is copied to
        write_json(Path(json_file), report | ({"failed": failed} if failed else {}))
    if junit_file:
        write_file(Path(junit_file), junit(report, verdicts))
    if page:
        with Path(page).open("a") as file:
            file.write(summary(report, verdicts))
    print(table(report["results"]))  # once everything is on the disk
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
