"""`service.codec.exact`: integers in, integers out, whatever carries or sums them."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.codec.exact import (
    FLOAT32_EXACT,
    LIMIT,
    IntegerLayer,
    ScaledLayer,
    TrainableLayer,
    depthwise,
    pointwise,
    ste_clamp,
)
from service.codec.prior import MEAN_LIMIT, PriorNet, carrier, parts
from tests.codec.test_model import FOUR_PASSES, TINY

CPU = torch.device("cpu")


def layer_of(out: int, fan_in: int, seed: int, low: int = -LIMIT) -> IntegerLayer:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (out, fan_in), generator=g).float()
    bias = torch.randint(-5000, 5000, (8, out), generator=g).float()
    return IntegerLayer(weight, bias, torch.randint(0, 12, (out,), generator=g).float(), low, LIMIT)


def inputs(b: int, c: int, h: int, w: int, seed: int, limit: int = LIMIT) -> torch.Tensor:
    return torch.randint(-limit, limit + 1, (b, h, w, c), generator=torch.Generator().manual_seed(seed)).float()


def ready(layer: IntegerLayer, dtype: torch.dtype = torch.float32) -> ScaledLayer:
    return layer.scaled(torch.device("cpu"), dtype)


@given(acc=st.integers(-(2**22), 2**22), shift=st.integers(0, 20))
def test_a_scaled_layer_rounds_half_up_exactly_like_integer_arithmetic(acc: int, shift: int) -> None:
    expected = (acc + (1 << shift >> 1)) >> shift
    one = IntegerLayer(torch.ones(1, 1), torch.full((8, 1), float(acc)), torch.tensor([float(shift)]), -(2**24), 2**24)
    assert int(pointwise(torch.zeros(1, 1, 1, 1), ready(one), torch.tensor([2]))) == expected


@given(seed=st.integers(0, 10**6), h=st.integers(1, 6), w=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_layers_agree_with_64_bit_integers(seed: int, h: int, w: int) -> None:
    rate = torch.tensor([seed % 8, 3])
    x = inputs(2, 24, h, w, seed)
    point, deep = layer_of(16, 24, seed), layer_of(24, 9, seed + 1)
    assert point.bound(LIMIT) < FLOAT32_EXACT
    acc = torch.einsum("oi,bhwi->bhwo", point.weight.long(), x.long()) + point.bias.long()[rate][:, None, None]
    expected = ((acc + (1 << point.shift.long() >> 1)) >> point.shift.long()).clamp(point.low, point.high)
    assert torch.equal(pointwise(x, ready(point), rate).long(), expected)
    kernel = deep.weight.double().reshape(24, 1, 3, 3)
    acc = torch.nn.functional.conv2d(x.double().permute(0, 3, 1, 2), kernel, padding=1, groups=24)
    acc = acc.permute(0, 2, 3, 1).long() + deep.bias.long()[rate][:, None, None]
    expected = (acc + (1 << deep.shift.long() >> 1)) >> deep.shift.long()
    assert torch.equal(depthwise(x, ready(deep), rate).long(), expected.clamp(deep.low, deep.high))


def test_order_of_summation_does_not_matter() -> None:
    x, layer, rate = inputs(3, 512, 9, 5, 1), layer_of(64, 512, 2), torch.tensor([0, 4, 7])
    order = torch.randperm(512, generator=torch.Generator().manual_seed(3))
    shuffled = IntegerLayer(layer.weight[:, order], layer.bias, layer.shift, layer.low, layer.high)
    reference = pointwise(x.double(), ready(layer, torch.float64), rate).float()
    small = IntegerLayer((layer.weight / 16).round(), layer.bias, layer.shift, layer.low, layer.high)
    assert small.bound(LIMIT) < FLOAT32_EXACT < layer.bound(LIMIT)
    small_shuffled = IntegerLayer(small.weight[:, order], small.bias, small.shift, small.low, small.high)
    assert torch.equal(pointwise(x, ready(small), rate), pointwise(x[..., order], ready(small_shuffled), rate))
    assert torch.equal(pointwise(x[..., order].double(), ready(shuffled, torch.float64), rate).float(), reference)


@given(h=st.integers(1, 5), w=st.integers(1, 5), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_the_halves_are_a_checkerboard_in_coding_order(h: int, w: int, seed: int) -> None:
    y = inputs(2, 6, h, w, seed)
    c, i, j = (torch.arange(n) for n in (6, h, w))
    black = (c[:, None, None] + i[:, None] + j) % 2 == 0
    for part, mask in zip(parts(h, w, 2, torch.device("cpu")), (black, ~black), strict=True):
        assert torch.equal(part.gathered(y), y.permute(0, 3, 1, 2)[:, mask])


@given(h=st.integers(1, 5), w=st.integers(1, 5), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_the_quarters_take_turns_in_every_square_in_coding_order(h: int, w: int, seed: int) -> None:
    y = inputs(2, 8, h, w, seed)
    c, i, j = (torch.arange(n) for n in (8, h, w))
    cell = 2 * (i[:, None] % 2) + j % 2
    turns = torch.tensor([[0, 3, 1, 2], [1, 2, 0, 3], [3, 0, 2, 1], [2, 1, 3, 0]])  # by group of channels and pass
    for index, part in enumerate(parts(h, w, 4, torch.device("cpu"))):
        mask = cell == turns[c % 4, index][:, None, None]
        assert torch.equal(part.gathered(y), y.permute(0, 3, 1, 2)[:, mask])


@given(h=st.integers(1, 5), w=st.integers(1, 5), seed=st.integers(0, 100), passes=st.sampled_from([2, 4]))
@settings(max_examples=40, deadline=None)
def test_every_latent_has_its_pass(h: int, w: int, seed: int, passes: int) -> None:
    y = inputs(2, 8, h, w, seed)
    whole, spoken = torch.zeros_like(y), torch.zeros_like(y)
    for part in parts(h, w, passes, torch.device("cpu")):
        values = part.gathered(y)
        assert values.shape == (2, y[0].numel() // passes)
        whole += part.placed(values, h, w)
        spoken += part.placed(torch.ones_like(values), h, w)
    assert torch.equal(whole, y)
    assert torch.equal(spoken, torch.ones_like(y))


@given(h=st.integers(1, 6), w=st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_the_first_two_of_four_passes_are_the_first_of_two(h: int, w: int) -> None:
    (half, _), (first, second, *_) = (parts(h, w, passes, torch.device("cpu")) for passes in (2, 4))
    spoken = first.placed(torch.ones(1, h * w * 2), h, w) + second.placed(torch.ones(1, h * w * 2), h, w)
    assert torch.equal(spoken, half.placed(torch.ones(1, h * w * 4), h, w))


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
    trained = pointwise(x, ready(layer.integers(torch.linspace(0, 1, 8))), rate)
    with torch.no_grad():
        shipped = pointwise(x, ready(layer.integers(torch.linspace(0, 1, 8))), rate)
    assert trained.requires_grad
    assert torch.equal(trained, shipped)


@pytest.mark.parametrize(("value", "gradient", "passes"), [(-2.0, -1.0, True), (-2.0, 1.0, False), (0.5, 1.0, True)])
def test_a_clamped_value_still_learns_its_way_back(value: float, gradient: float, passes: bool) -> None:
    x = torch.tensor([value], requires_grad=True)
    ste_clamp(x, 0, 1).backward(torch.tensor([gradient]))
    assert x.grad is not None
    assert bool(x.grad[0] != 0) == passes


def test_a_wide_layer_gets_a_wider_carrier_and_the_same_result() -> None:
    torch.manual_seed(2)
    net, cpu = PriorNet(FOUR_PASSES), torch.device("cpu")
    with torch.no_grad():
        integers = net.integers(torch.ones(8, TINY.latents))
    assert {layer.weight.dtype for layer in integers.on(cpu).layers.values()} == {torch.float32}
    mean = integers.layers["first_mean"]
    wide = IntegerLayer(mean.weight, mean.bias + FLOAT32_EXACT, mean.shift, mean.low, mean.high)
    integers.layers["first_mean"] = wide
    merge = integers.layers["fourth_merge"]
    integers.layers["fourth_merge"] = replace(merge, bias=merge.bias + FLOAT32_EXACT)
    assert carrier("first_mean", wide) == torch.float64
    mixed, double = integers.on(cpu), integers.on(cpu, torch.float64)
    assert {layer.weight.dtype for layer in mixed.outputs["first_mean"]} == {torch.float64}
    assert mixed.layers["fourth_merge"].weight.dtype == torch.float64
    features, rate = inputs(2, TINY.features, 5, 3, 1).abs(), torch.tensor([1, 6])
    y_hat = 16 * inputs(2, TINY.latents, 5, 3, 4, 30)
    for index, part in enumerate(parts(5, 3, 4, cpu)):
        narrow, exact = (prior.predict(index, features, y_hat, rate, part) for prior in (mixed, double))
        assert torch.equal(narrow.mean, exact.mean)
        assert torch.equal(narrow.level, exact.level)
    integers.layers["first_mean"] = IntegerLayer(mean.weight, mean.bias + 2.0**53, mean.shift, mean.low, mean.high)
    with pytest.raises(ValueError, match="first_mean"):
        integers.on(cpu)


def test_a_rescale_beyond_float32_is_refused() -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        integers = PriorNet(TINY).integers(torch.ones(8, TINY.latents))
    rescale = integers.context_rescale
    too_large = replace(rescale, factor=rescale.factor.clone().index_fill_(1, torch.tensor([3]), 512))
    with pytest.raises(ValueError, match="exact range of float32"):
        replace(integers, context_rescale=too_large).on(torch.device("cpu"))


def test_a_mean_beyond_float32_is_refused() -> None:
    with torch.no_grad():
        integers = PriorNet(TINY).integers(torch.ones(8, TINY.latents))
    layers = [integers.layers[name] for name in ("first_mean", "second_mean")]
    reach = max(max(abs(layer.low), abs(layer.high)) for layer in layers)
    rescale = integers.mean_rescale
    most = (FLOAT32_EXACT - 1) // reach
    for factor, fits in ((most, True), (most + 1, False)):
        changed = replace(integers, mean_rescale=replace(rescale, factor=torch.full_like(rescale.factor, factor)))
        if fits:
            changed.on(CPU)
            continue
        with pytest.raises(ValueError, match="exact range of float32"):
            changed.on(CPU)


def column(total: int, bias: int, shift: int) -> IntegerLayer:
    """A layer of one output whose weights sum to `total`, in steps of up to 127."""
    weights = [127.0] * (total // 127) + [float(total % 127)]
    return IntegerLayer(
        torch.tensor([weights]), torch.full((8, 1), float(bias)), torch.tensor([float(shift)]), -LIMIT, LIMIT
    )


@pytest.mark.parametrize(
    ("name", "total", "shift", "below"),
    [
        ("local1", 1000, 4, FLOAT32_EXACT - 8),  # the rounding term is 8
        ("local1", 1000, 0, FLOAT32_EXACT // 2 - 0.5),  # in halves
        ("up1", 1000, 4, FLOAT32_EXACT - 8 - 1000 * LIMIT),  # its inputs reach twice the limit
        ("fourth_hidden", 1000, 4, FLOAT32_EXACT - 8 - 1000 * LIMIT),
    ],
)
def test_a_carrier_holds_the_largest_sum_and_no_more(name: str, total: int, shift: int, below: float) -> None:
    """`below`: of the sum over inputs of +-LIMIT and the bias, from where on float32 no longer holds all."""
    least = math.ceil(below) - total * LIMIT
    assert carrier(name, column(total, least - 1, shift)) == torch.float32
    assert carrier(name, column(total, least, shift)) == torch.float64


def test_what_is_no_integer_is_refused() -> None:
    with torch.no_grad():
        integers = PriorNet(TINY).integers(torch.ones(8, TINY.latents))
    layer = integers.layers["up1"]
    for wrong in (
        replace(layer, weight=layer.weight + 0.3),
        replace(layer, weight=layer.weight * 0 + 128),
        replace(layer, bias=layer.bias + 0.37),
        replace(layer, shift=layer.shift - 64),
        replace(layer, shift=layer.shift + 64),
        replace(layer, high=0.5),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="up1: expected"):
            replace(integers, layers={**integers.layers, "up1": wrong}).on(CPU)
    mean, context = integers.mean_rescale, integers.context_rescale
    for rescales in (
        {"mean_rescale": replace(mean, factor=mean.factor + 0.5)},
        {"mean_rescale": replace(mean, shift=mean.shift - 128)},
        {"context_rescale": replace(context, shift=context.shift + 0.5)},
    ):
        with pytest.raises(ValueError, match="integers for rescales"):
            replace(integers, **rescales).on(CPU)  # type: ignore[arg-type]


def test_layers_that_do_not_fit_are_refused() -> None:
    with torch.no_grad():
        integers = PriorNet(TINY).integers(torch.ones(8, TINY.latents))
    level, mean = integers.layers["second_level"], integers.layers["first_mean"]
    for wrong, said in (
        (replace(integers, passes=4), "third_merge"),
        (replace(integers, layers={**integers.layers, "fifth_near": level}), "fifth_near"),
        (replace(integers, layers={**integers.layers, "second_level": replace(level, high=64)}), "second_level"),
        (replace(integers, layers={**integers.layers, "up1": replace(level, low=-1024)}), "up1"),
        (replace(integers, context_rescale=replace(integers.context_rescale, limit=LIMIT + 1)), "limits"),
        (replace(integers, mean_rescale=replace(integers.mean_rescale, limit=MEAN_LIMIT + 1)), "limits"),
        (replace(integers, layers={**integers.layers, "first_mean": replace(mean, high=2**40)}), "first_mean"),
        (replace(integers, layers={**integers.layers, "first_mean": replace(mean, low=-(2**40))}), "first_mean"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong.on(torch.device("cpu"))
