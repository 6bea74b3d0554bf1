"""The gate for CI: limits, a comparison with an earlier record, and reports that CI systems read."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmaps.errors import UserError, blame
from flowmaps.evaluation.record import ROW_KEY, Record, Row, read_record, representations, table
from flowmaps.evaluation.verdicts import Difference, Verdict, failures, junit, name, summary
from flowmaps.files import WRITER, WRITTEN_BY, check_new_file, writable_directory, write_file, write_json

# What two records must agree in before their distances can be compared.
PROTOCOL = tuple("metric extractor num seeds label label_policy condition guidance guidance_interval gamma".split())


@dataclass(frozen=True)
class Limits:
    """The limits: ``max_fid`` of the first distance, and (1 + ``tolerance``) times each one in the record ``file``.

    A distance above the second one fails if it is significantly above the record's, at the one-sided level
    ``confidence`` of a paired test. Without standard errors in one of the two records every difference counts.

    Raises:
        UserError: A limit is not a finite number of at least 0, or the record is that of a run that failed its gate.
    """

    max_fid: float | None = None
    file: str = ""
    tolerance: float = 0.0
    baseline: Record | None = None
    confidence: float = 0.99

    def __post_init__(self) -> None:
        for field, value in (("max_fid", self.max_fid), ("tolerance", self.tolerance)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError("must be a number of at least 0", field=field, value=value)
        if not 0.5 <= self.confidence < 1:
            raise UserError("must be at least 0.5 and below 1", field="confidence", value=self.confidence)
        if self.baseline is not None and self.baseline.get("failed"):
            raise self._refusal(
                f"was written by a run that failed its gate ({self.baseline['failed'][0]}): give the record that this "
                "run was compared with, or accept these scores with --update_baseline"
            )

    @classmethod
    def read(cls, max_fid: float | None, file: str | None, tolerance: float, confidence: float = 0.99) -> "Limits":
        """Make limits from an upper bound and the record ``file`` of ``fid.py --json``, both optional."""
        if not file:
            return cls(max_fid)
        with blame("max_regression", file):
            return cls(max_fid, file, tolerance, read_record(file), confidence)

    def check(self, report: Record) -> None:
        """Refuse a baseline that is not comparable with ``report``, whose rows need no scores yet, or lacks a row."""
        if self.baseline is None:
            return
        for fact in PROTOCOL:
            if report.get(fact) != self.baseline.get(fact):
                raise self._refusal(
                    f"was made with another {fact} ({self.baseline.get(fact)}, now {report.get(fact)}): make it again, "
                    "or score as it was made"
                )
        before = {part["metric"]: part for part in representations(self.baseline)}
        for part in representations(report):
            metric = part["metric"]
            if metric not in before:
                raise self._refusal(f"has no {metric}: make it again with the same extractors")
            if part["extractor"] != before[metric]["extractor"]:
                raise self._refusal(f"was made with another extractor of {metric}: make it again")
            ours, theirs = part["reference"], before[metric]["reference"]
            known = "content" if ours["content"] and theirs["content"] else "sha256"
            if ours[known] != theirs[known]:
                raise self._refusal("was made with another reference: make it again")
        for row in report["results"]:
            self.baseline_row(row)

    def _refusal(self, reason: str) -> UserError:
        return UserError(reason, field="max_regression", value=self.file)

    def baseline_row(self, row: Row) -> Row:
        """Return the baseline's row with the same key as ``row``."""
        assert self.baseline is not None
        for old in self.baseline["results"]:
            if _key(old) == _key(row):
                return dict(old)
        raise self._refusal(f"has no row for {name(row)}: make it again")

    def _meaning(self, difference: Difference, worse: bool) -> str:
        if difference.se is None:
            return ", standard error unknown"
        if not worse:
            return ", no significant worsening"
        return f", significantly worse (tolerance={self.tolerance:g})"

    def judge(self, report: Record) -> list[Verdict]:
        """Return a verdict on each distance of each row of ``report``."""
        metrics = [part["metric"] for part in representations(report)]
        return [
            self._verdict(row, metric, name(row) if metric == metrics[0] else f"{name(row)}, {metric}", metrics[0])
            for row in report["results"]
            for metric in metrics
        ]

    def _verdict(self, row: Row, metric: str, title: str, first: str) -> Verdict:
        """Judge one distance of a row; ``max_fid`` is the limit of the ``first`` one."""
        value, reasons, comparison, difference = row[metric], [], "", None
        if self.max_fid is not None and metric == first and not value <= self.max_fid:
            reasons.append(f"{metric} {value:.4g} is above max_fid={self.max_fid:g}")
        if self.baseline is not None:
            difference = Difference.of(row, self.baseline_row(row), metric)
            worse = difference.is_worse(self.confidence)
            if worse and not value <= (1 + self.tolerance) * difference.before:  # NaN fails too
                reasons.append(
                    f"{metric} {value:.4g} is more than tolerance={self.tolerance:g} above the "
                    f"{difference.before:.4g} of max_regression={self.file}: {difference}"
                )
            comparison = f"{difference}{self._meaning(difference, worse)}: {'failed' if reasons else 'passed'}"
        return Verdict(title, metric, value, tuple(reasons), comparison, difference)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ROW_KEY)


def check_outputs(
    json_file: str | None,
    junit_file: str | None,
    page: str | None,
    baseline_file: str | None = None,
    markdown_file: str | None = None,
) -> None:
    """Refuse, before any work, files that ``finish`` could not write, or that are something else of flowmaps."""
    records = (("json", json_file, _is_record), ("max_regression", baseline_file, _is_record))
    for field, file, is_kind in (*records, ("junit", junit_file, _is_junit), ("markdown", markdown_file, _is_page)):
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


def _is_page(file: Path) -> bool:
    return file.read_bytes()[:4] == b"### "


def _is_junit(file: Path) -> bool:
    return b"<testsuites" in file.read_bytes()[:1000]


def finish(
    report: Record,
    limits: Limits,
    json_file: str | None,
    junit_file: str | None,
    page: str | None,
    baseline_file: str | None = None,
    markdown_file: str | None = None,
) -> int:
    """Print the results, write the files and return the exit code.

    ``markdown_file`` gets what is appended to the CI system's ``page``, for a comment on a change, and
    ``baseline_file`` the record unless a limit is exceeded.
    """
    verdicts = limits.judge(report)
    failed = failures(verdicts)
    if json_file:  # of a failed run too, but marked, so that it never becomes a baseline, whatever it is copied to
        write_json(Path(json_file), report | ({"failed": failed} if failed else {}))
    if baseline_file and not failed:
        write_json(Path(baseline_file), report)
    if junit_file:
        write_file(Path(junit_file), junit(report, verdicts))
    if markdown_file:
        write_file(Path(markdown_file), f"{summary(report, verdicts)}<!-- {WRITTEN_BY}: {WRITER} -->\n".encode())
    if page:
        with Path(page).open("a") as file:
            file.write(summary(report, verdicts))
    print(table(report["results"]))  # once everything is on the disk
    for verdict in verdicts:
        if verdict.comparison:
            print(f"{verdict.name}: {verdict.comparison}")
    if baseline_file and not failed:
        print(f"{baseline_file} is the new baseline")
    if failed:
        print(f"gate failed: {'; '.join(failed)}", file=sys.stderr)
    return int(bool(failed))
