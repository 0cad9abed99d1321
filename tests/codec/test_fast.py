"""`codec.fast`: the same function as the blocks that are trained, in any strips."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TypeVar

import pytest
import torch

from service.codec import fast
from service.codec.config import CodecConfig, Stage
from service.codec.fast import speed_up
from service.codec.transforms import Analysis, Synthesis

Transform = TypeVar("Transform", bound=Analysis | Synthesis)
CONFIG = CodecConfig("tiny", stem=8, stages=(Stage(64, 2), Stage(32, 1)), ffn=1.5)


def lively(transform: Transform) -> Transform:
    """With weights that let every branch count: fresh ones are zero."""
    torch.manual_seed(3)
    for weight in transform.parameters():
        torch.nn.init.normal_(weight, std=0.15) if weight.ndim > 1 else torch.nn.init.uniform_(weight, 0.5, 1.2)
    transform.eval().requires_grad_(False)
    return transform


@pytest.mark.parametrize("positions", [2**15, 60, 7])
@pytest.mark.parametrize("size", [(13, 7), (7, 13), (3, 20), (1, 40)])
@pytest.mark.parametrize("kind", [Analysis, Synthesis])
def test_the_fast_stacks_compute_what_the_trained_ones_do(
    kind: type[Analysis | Synthesis], size: tuple[int, int], positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "STRIP_POSITIONS", positions)
    trained = lively(kind(CONFIG))
    quick = copy.deepcopy(trained)
    speed_up(quick, torch.float32)
    rate = torch.tensor([0, 7, 3])
    h, w = size
    x = torch.rand(3, 3, 16 * h, 16 * w) if kind is Analysis else 3 * torch.randn(3, 32, h, w)
    wanted, got = trained(x, rate), quick(x, rate)
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.std()))


def test_strips_cover_every_row_or_column_once_and_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "STRIP_POSITIONS", 50)
    for height in (1, 2, 9, 100):
        for width in (1, 10, 49, 500):
            axis, strips = fast._strips(height, width)
            length, across = (height, width) if axis == 1 else (width, height)
            assert strips[0][0] == 0
            assert strips[-1][1] == length
            assert all(one[1] == two[0] for one, two in pairwise(strips))
            assert all(top < bottom for top, bottom in strips)
            assert max(bottom - top for top, bottom in strips) * across <= max(50, across) * 2
