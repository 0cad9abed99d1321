"""`service.codec`: sizes, blocks and transforms; the trainable codec against the shipped one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from service.codec.blocks import HATB
from service.codec.config import CONFIGS, EDGE, CodecConfig, Stage
from service.codec.cost import cost
from service.codec.model import TrainableCodec, ship
from service.codec.shipped import ShippedCodec, latent_size
from service.codec.tables import SCALE_LEVELS, gaussian_tables, level_to_scale, scale_to_level
from service.engine import Photo

TINY = CodecConfig("tiny", stem=8, stages=(Stage(32, 1), Stage(48, 1)), group=16, hyper=8, features=16, context=16)


FOUR_PASSES = replace(TINY, passes=4)


def test_a_fresh_block_is_the_identity() -> None:
    x = torch.randn(2, 32, 5, 7)
    assert torch.equal(HATB(32, 2, 2.0)(x), x)


@pytest.mark.parametrize("config", [TINY, FOUR_PASSES], ids=["two", "four"])
def test_gradients_reach_every_parameter(config: CodecConfig) -> None:
    model = TrainableCodec(config)
    for block in model.modules():
        if isinstance(block, torch.nn.Conv2d):
            torch.nn.init.normal_(block.weight, std=0.1)
    out = model(torch.rand(8, 3, 64, 48), torch.arange(8))
    (out.x_hat.square().mean() + out.y_bits.mean() + out.z_bits.mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_size_runs_both_ways(name: str) -> None:
    model = TrainableCodec(CONFIGS[name]).eval()
    with torch.inference_mode():
        out = model(torch.rand(1, 3, 64, 64), torch.tensor([3]))
    assert out.x_hat.shape == (1, 3, 64, 64)
    assert torch.isfinite(out.x_hat).all()
    assert float(out.y_bits + out.z_bits) > 0


def test_sizes_keep_their_budgets() -> None:
    edge, base = cost(CONFIGS["edge"]), cost(CONFIGS["base"])
    assert edge.encoder == pytest.approx(edge.decoder)  # they mirror each other
    assert edge.kmac_per_pixel <= 45
    assert edge.parameters <= 5e6
    assert base.kmac_per_pixel <= 220
    assert base.parameters <= 12e6
    # arXiv 2502.03649: about 510 and 1120 kMAC/px.
    assert cost(CONFIGS["paper-s"]).kmac_per_pixel == pytest.approx(510, rel=0.05)
    assert cost(CONFIGS["paper-l"]).kmac_per_pixel == pytest.approx(1120, rel=0.05)


def test_a_shape_that_cannot_work_is_named() -> None:
    with pytest.raises(ValueError, match="step down by 16"):
        CodecConfig("wrong", stem=8, stages=(Stage(32, 1),))
    with pytest.raises(ValueError, match="equal groups"):
        CodecConfig("wrong", stem=8, stages=(Stage(65, 1), Stage(64, 1)))
    with pytest.raises(ValueError, match="2 or 4 passes"):
        replace(TINY, passes=3)
    with pytest.raises(ValueError, match="divide the 62 latents"):
        CodecConfig("wrong", stem=8, stages=(Stage(32, 1), Stage(62, 1)), heads=2, passes=4)


@pytest.mark.parametrize("passes", [2, 4])
def test_certain_latents_are_not_coded_and_equal_their_mean(parrots: Photo, passes: int) -> None:
    torch.manual_seed(4)
    model = TrainableCodec(replace(TINY, skipped=6, passes=passes)).eval()
    with torch.no_grad():  # levels on both sides of the limit
        for step in ("first", "second"):
            model.prior.layer(f"{step}_level").bias_low.copy_(torch.linspace(0, 2, TINY.latents))
            model.prior.layer(f"{step}_level").bias_high.copy_(torch.linspace(0, 2, TINY.latents))
    tensors, description = ship(model)
    codec = ShippedCodec.from_tensors(tensors, description, torch.device("cpu"))
    x, rate = torch.from_numpy(parrots[:96, :80].copy()).permute(2, 0, 1)[None].float() / 255, torch.tensor([6])
    y, z_hat, _ = codec.analyse(x, rate)
    (latents,) = codec.symbols_of(8 * y, z_hat, rate)
    assert len(latents.passes) == passes
    certain = [symbols[levels <= 6] for symbols, levels in latents.passes]
    assert all(len(symbols) > 100 and not symbols.any() for symbols in certain)
    assert any(symbols[levels > 6].any() for symbols, levels in latents.passes)
    y_hat = codec.read([codec.write(latents)], rate, 6, 5)
    ((again,), _) = codec.rounded(y_hat, z_hat, rate)
    assert all(np.array_equal(a, b) for one, two in zip(latents.passes, again.passes) for a, b in zip(one, two))
    older = json.loads(description)
    del older["config"]["skipped"]
    if passes == 2:
        del older["config"]["passes"]
    first = ShippedCodec.from_tensors(tensors, json.dumps(older), torch.device("cpu"))
    assert (first.config.skipped, first.config.passes) == (0, passes)


@pytest.mark.parametrize("name", ["y", "z"])
def test_too_few_tables_or_symbols_beyond_reach_are_refused(name: str) -> None:
    tensors, description = ship(TrainableCodec(TINY))
    fewer = {f"tables.{name}.{key}": tensors[f"tables.{name}.{key}"][:-1] for key in ("cdf", "size", "offset")}
    beyond = {f"tables.{name}.offset": tensors[f"tables.{name}.offset"] - 2**15}
    for changed in (fewer, beyond):
        with pytest.raises(ValueError, match=f"tables for {name}"):
            ShippedCodec.from_tensors({**tensors, **changed}, description, torch.device("cpu"))


def test_scale_levels_match_their_tables() -> None:
    levels = torch.arange(SCALE_LEVELS).float()
    assert torch.allclose(scale_to_level(level_to_scale(levels)), levels, atol=1e-3)
    tables = gaussian_tables()
    assert float(level_to_scale(torch.tensor(0.0))) == pytest.approx(0.11)
    for level, tolerance in ((20, 0.05), (40, 0.05), (63, 0.12)):  # least frequencies widen the widest tables
        row = torch.from_numpy(tables.cdf[level, : tables.size[level]]).double()
        symbols = torch.arange(len(row) - 1) + int(tables.offset[level])
        deviation = ((row.diff() / 65536) * symbols**2).sum().sqrt()
        rounded = (level_to_scale(levels[level]) ** 2 + 1 / 12).sqrt()  # rounding adds the variance of a uniform
        assert float(deviation) == pytest.approx(float(rounded), rel=tolerance)


def test_estimated_bits_are_the_bits_of_the_stream(parrots: Photo) -> None:
    """What the model estimates in evaluation mode is what ships, to within 1%."""
    torch.manual_seed(3)
    model = TrainableCodec(EDGE).eval()
    x = torch.from_numpy(parrots.copy()).permute(2, 0, 1)[None].float() / 255
    rate = torch.tensor([5])
    with torch.no_grad():
        model.start_entropy_from((model.g_a(x, rate) / model.g_a.gain(rate)).std((0, 2, 3)))
    codec = ShippedCodec.from_tensors(*ship(model), torch.device("cpu"))
    for name in ("g_a", "g_s", "h_a"):  # the float16 of the store, on both sides
        getattr(model, name).half().float()
    with torch.inference_mode():
        estimate = model(x, rate)
        y, z_hat, _ = codec.analyse(x, rate)
        coded = codec.write(codec.symbols_of(y, z_hat, rate)[0])
    expected = float(estimate.y_bits + estimate.z_bits)
    assert 8 * (len(coded.payload) + len(coded.outliers)) == pytest.approx(expected, rel=0.01, abs=100)
    y_hat = codec.read([coded], rate, *latent_size(*parrots.shape[:2]))
    # Convolutions in another memory layout may tip a latent that lies between two integers: a few, not many.
    assert float((codec.synthesise(y_hat, rate) - estimate.x_hat.clamp(0, 1)).abs().mean()) < 1e-3
