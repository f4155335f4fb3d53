"""What a client is told of audited blocks."""

from __future__ import annotations

import pytest

from sps_runtime.sparse.audit import RECORD
from sps_runtime.sparse.audit_summary import AuditSummary, summarize


def test_without_samples_nothing_is_claimed() -> None:
    assert summarize(b"") == AuditSummary()


def test_every_figure_is_of_what_its_name_says() -> None:
    taus = {
        (0, 0, 64): (0.1, 0.5),
        (0, 1, 64): (0.2, 0.9),
        (1, 0, 64): (0.4, 0.4),
        (0, 0, 128): (0.3, 0.3),
        (1, 1, 128): (0.0, 0.1),
    }
    records = [RECORD.pack(*where, *tau) for where, tau in taus.items()]
    for packed in (b"".join(records), b"".join(reversed(records))):
        found = summarize(packed)
        assert found.samples == 5
        assert found.mean == pytest.approx(0.2)
        assert found.p95 == pytest.approx(0.4)
        assert found.maximum == pytest.approx(0.9)
        assert found.last == pytest.approx(0.15)
        assert found.worst == (1, 0)
