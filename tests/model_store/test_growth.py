"""`model_store.training.growth`: a larger model begins as the smaller one that it starts from, and can leave it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model_store.training.growth import grown
from service.codec.config import CodecConfig, Stage
from service.codec.model import TrainableCodec
from tests.codec.test_model import FOUR_PASSES, TINY

DEEPER = replace(TINY, stages=(Stage(32, 3), Stage(48, 2)))
FINER = replace(FOUR_PASSES, stem=4, stages=(Stage(64, 1), *DEEPER.stages))


@pytest.fixture(scope="module")
def small() -> TrainableCodec:
    """One whose blocks and biases all do something."""
    torch.manual_seed(3)
    model = TrainableCodec(TINY).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def _both_ways(model: TrainableCodec) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, rate = torch.rand(2, 3, 48, 80, generator=generator), torch.tensor([1, 6])
    with torch.inference_mode():
        return model.g_a(x, rate), model.g_s(4 * torch.randn(2, 48, 3, 5, generator=generator), rate)


@pytest.mark.parametrize("config", [TINY, FOUR_PASSES, DEEPER, FINER], ids=["same", "passes", "deeper", "finer"])
def test_a_grown_model_does_what_the_smaller_one_did(small: TrainableCodec, config: CodecConfig) -> None:
    large = TrainableCodec(config).eval()
    large.load_state_dict(grown(small.state_dict(), config))
    for before, after in zip(_both_ways(small), _both_ways(large)):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_what_has_grown_can_learn(small: TrainableCodec) -> None:
    large = TrainableCodec(FINER)
    large.load_state_dict(grown(small.state_dict(), FINER))
    y, rate = large.g_a(torch.rand(1, 3, 48, 80), torch.tensor([3])), torch.tensor([3])
    (y.square().mean() + large.g_s(y, rate).square().mean()).backward()
    for stack in (large.g_a.stacks[0], large.g_s.stacks[2]):
        out = dict(stack.named_parameters())["blocks.0.ffn.out.weight"]
        assert out.grad is not None
        assert out.grad.flatten(1).any(1).all()  # those that lead to the idle channels too


def test_growth_is_the_same_every_time(small: TrainableCodec) -> None:
    first, second = (grown(small.state_dict(), FINER) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_finer_stage_that_cannot_hold_its_patches_is_refused(small: TrainableCodec) -> None:
    narrow = replace(FINER, stages=(Stage(32, 1), *DEEPER.stages))
    with pytest.raises(ValueError, match="at least 48 channels, got 32"):
        grown(small.state_dict(), narrow)
