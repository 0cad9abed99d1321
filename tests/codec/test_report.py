"""`service.codec.report`: the head's findings, and how they are worded and stored."""

from __future__ import annotations

import pytest
import torch

from service.codec import report
from service.codec.bitstream import Degradation, DegradationKind
from service.codec.config import CONFIGS
from service.codec.report import KINDS, ReportHead
from service.codec.transforms import Analysis
from tests.codec.test_model import TINY


def test_a_large_photo_is_judged_by_a_sample_of_it() -> None:
    torch.manual_seed(1)
    head, dim = ReportHead(TINY), TINY.stages[0].dim
    small = torch.randn(2, dim, 32, 48)
    large = small.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert report._POSITIONS < 9 * 32 * 48
    assert torch.allclose(head.summary(0, large), head.summary(0, small), atol=1e-5)


def test_a_summary_does_not_grow_with_the_photo() -> None:
    head = ReportHead(TINY)
    dim = TINY.stages[0].dim
    assert head.summary(1, torch.ones(1, dim, 4, 5)).shape == head.summary(1, torch.ones(1, dim, 40, 50)).shape


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_size_shows_its_stage_at_an_eighth(name: str) -> None:
    config, seen = CONFIGS[name], list[torch.Size]()
    with torch.inference_mode():
        Analysis(config)(torch.rand(1, 3, 64, 96), torch.tensor([3]), lambda _, x: seen.append(x.shape))
    dim = ReportHead(config).deviation.shape[1]
    assert seen == [(1, dim, 8, 12)] * 2


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
