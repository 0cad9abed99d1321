"""`service.codec.report`: the head says the same of a photo in one piece or in strips, and words its findings well."""

from __future__ import annotations

import pytest
import torch

from service.codec import report
from service.codec.bitstream import Degradation, DegradationKind
from service.codec.report import KINDS, ReportHead
from tests.codec.test_model import TINY


def test_strips_do_not_change_the_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    head, features = ReportHead(TINY), torch.randn(2, TINY.stages[0].dim, 24, 36)
    whole = head.summary(0, features)
    monkeypatch.setattr(report, "_STRIP_POSITIONS", 5 * 36)
    assert torch.allclose(head.summary(0, features), whole, atol=1e-5)


def test_a_summary_does_not_grow_with_the_photo() -> None:
    head = ReportHead(TINY)
    dim = TINY.stages[0].dim
    assert head.summary(1, torch.ones(1, dim, 4, 5)).shape == head.summary(1, torch.ones(1, dim, 40, 50)).shape


def test_findings_are_what_is_likely_strongest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    head = ReportHead(TINY)
    odds, strength = torch.full((3, len(KINDS)), -4.0), torch.zeros(3, len(KINDS))
    odds[0, [0, 3]], strength[0, [0, 3]] = 3.0, torch.tensor([0.25, 0.75])
    odds[1, 6], strength[1, 6] = 1.0, 7.0
    monkeypatch.setattr(head, "forward", lambda _: (odds, strength))
    both, strong, nothing = head.findings([])
    assert both == (Degradation(DegradationKind.HAZE, 191 / 255), Degradation(DegradationKind.NOISE, 64 / 255))
    assert strong == (Degradation(DegradationKind.JPEG, 1.0),)
    assert [one.kind for one in nothing] == [DegradationKind.CLEAN]
    assert nothing[0].strength == pytest.approx(0.982, abs=1 / 255)
