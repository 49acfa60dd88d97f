"""What every refusal looks like."""

from __future__ import annotations

from tests.conftest import Outcome


def assert_refused(outcome: Outcome, *fragments: str, lines: int = 1) -> None:
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.stdout + outcome.stderr
    assert len(outcome.lines) == lines, outcome.stderr
    for line in outcome.lines:
        assert line.startswith("error: "), line
    for fragment in fragments:
        assert fragment in outcome.stderr, outcome.stderr
