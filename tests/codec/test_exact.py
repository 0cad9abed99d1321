"""`service.codec.exact`: integers in, integers out, whatever carries or sums them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.codec.exact import (
    FLOAT32_EXACT,
    LIMIT,
    IntegerLayer,
    TrainableLayer,
    depthwise,
    pointwise,
    requantise,
    straight_clamp,
)


def layer_of(out: int, fan_in: int, seed: int, low: int = -LIMIT) -> IntegerLayer:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (out, fan_in), generator=g).float()
    bias = torch.randint(-5000, 5000, (8, out), generator=g).float()
    return IntegerLayer(weight, bias, torch.randint(0, 12, (out,), generator=g).float(), low, LIMIT)


def inputs(b: int, c: int, h: int, w: int, seed: int, limit: int = LIMIT) -> torch.Tensor:
    return torch.randint(-limit, limit + 1, (b, c, h, w), generator=torch.Generator().manual_seed(seed)).float()


@given(acc=st.integers(-(2**22), 2**22), shift=st.integers(0, 20))
def test_requantise_rounds_half_up_exactly_like_integer_arithmetic(acc: int, shift: int) -> None:
    expected = (acc + (1 << shift >> 1)) >> shift
    got = requantise(torch.tensor(float(acc)), torch.tensor(float(shift)), -(2**24), 2**24)
    assert int(got) == expected


@given(seed=st.integers(0, 10**6), h=st.integers(1, 6), w=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_layers_agree_with_64_bit_integers(seed: int, h: int, w: int) -> None:
    rate = torch.tensor([seed % 8, 3])
    x = inputs(2, 24, h, w, seed)
    point, deep = layer_of(16, 24, seed), layer_of(24, 9, seed + 1)
    assert point.bound(LIMIT) < FLOAT32_EXACT
    acc = torch.einsum("oi,bihw->bohw", point.weight.long(), x.long()) + point.bias.long()[rate][:, :, None, None]
    half = (1 << point.shift.long() >> 1)[:, None, None]
    expected = ((acc + half) >> point.shift.long()[:, None, None]).clamp(point.low, point.high)
    assert torch.equal(pointwise(x, point, rate).long(), expected)
    kernel = deep.weight.double().reshape(24, 1, 3, 3)
    acc = torch.nn.functional.conv2d(x.double(), kernel, padding=1, groups=24) + deep.bias[rate][:, :, None, None]
    expected = (acc.long() + (1 << deep.shift.long() >> 1)[:, None, None]) >> deep.shift.long()[:, None, None]
    assert torch.equal(depthwise(x, deep, rate).long(), expected.clamp(deep.low, deep.high))


def test_order_of_summation_does_not_matter() -> None:
    x, layer, rate = inputs(3, 512, 9, 5, 1), layer_of(64, 512, 2), torch.tensor([0, 4, 7])
    order = torch.randperm(512, generator=torch.Generator().manual_seed(3))
    shuffled = IntegerLayer(layer.weight[:, order], layer.bias, layer.shift, layer.low, layer.high)
    carrier = layer.to(torch.device("cpu"), torch.float64)
    reference = pointwise(x.double(), carrier, rate).float()
    small = IntegerLayer((layer.weight / 16).round(), layer.bias, layer.shift, layer.low, layer.high)
    assert small.bound(LIMIT) < FLOAT32_EXACT < layer.bound(LIMIT)
    small_shuffled = IntegerLayer(small.weight[:, order], small.bias, small.shift, small.low, small.high)
    assert torch.equal(pointwise(x, small, rate), pointwise(x[:, order], small_shuffled, rate))
    double = shuffled.to(torch.device("cpu"), torch.float64)
    assert torch.equal(pointwise(x[:, order].double(), double, rate).float(), reference)


def test_a_trainable_layer_is_exact_in_float32_by_construction() -> None:
    positions = torch.linspace(0, 1, 8)
    for scale in (1e-4, 1.0, 30.0):
        layer = TrainableLayer(512, 32)
        with torch.no_grad():
            layer.weight.mul_(scale)
            layer.bias_low.fill_(1e6)
        with torch.no_grad():
            integers = layer.integers(positions)
        assert integers.bound(LIMIT) < FLOAT32_EXACT
        assert torch.equal(integers.weight, integers.weight.round())
        assert float(integers.weight.abs().max()) <= 127
        assert torch.equal(integers.bias, integers.bias.round())
        assert float(integers.shift.min()) >= 0


def test_training_and_shipping_arithmetic_are_the_same() -> None:
    layer, rate = TrainableLayer(32, 16), torch.arange(8)
    x = inputs(8, 32, 4, 4, 7)
    trained = pointwise(x, layer.integers(torch.linspace(0, 1, 8)), rate)
    with torch.no_grad():
        shipped = pointwise(x, layer.integers(torch.linspace(0, 1, 8)), rate)
    assert trained.requires_grad
    assert torch.equal(trained, shipped)


@pytest.mark.parametrize(("value", "gradient", "passes"), [(-2.0, -1.0, True), (-2.0, 1.0, False), (0.5, 1.0, True)])
def test_a_clamped_value_still_learns_its_way_back(value: float, gradient: float, passes: bool) -> None:
    x = torch.tensor([value], requires_grad=True)
    straight_clamp(x, 0, 1).backward(torch.tensor([gradient]))
    assert x.grad is not None
    assert bool(x.grad[0] != 0) == passes
