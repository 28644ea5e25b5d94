"""Some hundred mutations of each kind of input; ``make endurance`` has thousands."""

from __future__ import annotations

from tests.endurance import fuzz


def test_mutated_input_is_taken_or_refused() -> None:
    findings = fuzz.run(seed=0, quick=True)
    assert len(findings.figures) == len(fuzz.FORMATS)
    assert findings.broken() == []
