"""What the demo's report concludes from the numbers."""

import pytest

from flowmaps.evaluation.report import conclusions

COUNTS = (1, 2, 4, 8, 32)
WHY = "Flow matching learns it from all of its training rows, the flow map from 75% of its"


def said(jump, euler):
    rows = [{"model": "flow map", "steps": n, "FD": d} for n, d in zip(COUNTS, jump, strict=False)]
    rows += [{"model": "Euler", "steps": n, "FD": d} for n, d in zip(COUNTS, euler, strict=True)]
    return " ".join(conclusions(rows, "FD", floor=0.56, drift_share=0.75))


@pytest.mark.parametrize(
    ("jump", "euler", "parts", "why"),
    [
        (
            (3, 2.5, 2.4, 2.3),
            (12, 5, 1.9, 1.2, 1.0),
            (
                "In 1 and 2 steps the flow map is ahead: FD 3 against 12 and 2.5 against 5 (",
                "In 4 and 8 steps Euler is",
                "in 1 step, FD 3, Euler needs 4 steps.",
                "Euler in 32 steps, is at 1. Training images themselves are at 0.56",
            ),
            True,
        ),
        (
            (1, 0.9, 0.8, 0.7),
            (12, 5, 4, 3, 2),
            (
                "In 1, 2, 4 and 8 steps the flow map is ahead",
                "Euler needs more than 32 steps",
                "the flow map in 8 steps, is",
            ),
            False,
        ),
        (
            (3, 2, 1.01, 1.2),
            (1, 1, 1, 1, 1),
            (
                "In 1, 2 and 8 steps Euler is ahead: FD 1 against 3",
                "In 4 steps the two are even",
                "Euler needs 1 step.",
            ),
            True,
        ),
    ],
    ids=["each ahead somewhere", "the map ahead", "Euler ahead"],
)
def test_conclusions_follow_from_the_numbers(jump, euler, parts, why):
    text = said(jump, euler)
    for part in parts:
        assert part in text
    assert (WHY in text) == why and (" Euler is ahead" in text) == why
