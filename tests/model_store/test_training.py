"""`model_store.training`: a run starts warm, resumes without losing a step, and minimises what it should."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from model_store.training import held_out
from model_store.training import step as one_step
from model_store.training.ablations import _silence
from model_store.training.average import average
from model_store.training.batches import Batches
from model_store.training.compiled import compile_prior
from model_store.training.curves import draw
from model_store.training.loss import balanced_distortion
from model_store.training.photos import PhotoPool, tone_jittered
from model_store.training.schedule import Schedule
from model_store.training.soup import soup
from model_store.training.warm_start import warm_start
from model_store.training.weights import keep_weights, read_weights, stretched, weights_to_start_from
from service.codec import model as codec_model
from service.codec import prior
from service.codec.config import CONFIGS, LAMBDA_RANGE
from service.codec.model import TrainableCodec
from service.codec.transforms import rate_lambda
from service.engine import Photo
from tests.codec.test_model import FOUR_PASSES, TINY
from tests.conftest import image_bytes
from tests.model_store.conftest import run

CPU = torch.device("cpu")


def test_a_warm_start_is_a_working_transform_coder(photos: Path, parrots: Photo) -> None:
    model = TrainableCodec(CONFIGS["edge"]).eval()
    warm_start(model, PhotoPool(photos, 128, CPU), crops=20)
    x = torch.from_numpy(parrots.copy()).permute(2, 0, 1)[None].float() / 255
    quality = []
    for rate in (0, 4, 7):
        with torch.inference_mode():
            out = model(x, torch.tensor([rate]))
        quality.append(float(-10 * (out.x_hat - x).square().mean().log10()))
    assert quality == sorted(quality)
    assert quality[-1] > 30


def test_a_stem_with_more_outputs_than_inputs_starts_warm_too(photos: Path, parrots: Photo) -> None:
    model = TrainableCodec(CONFIGS["base"]).eval()
    warm_start(model, PhotoPool(photos, 128, CPU), crops=12)
    x = torch.from_numpy(parrots.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        out = model(x, torch.tensor([7]))
    assert float(-10 * (out.x_hat - x).square().mean().log10()) > 30


def test_a_run_that_was_killed_goes_on_as_if_it_had_not(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = torch.load(run(photos, tmp_path / "a", 16, monkeypatch), weights_only=True)
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "b", 16, monkeypatch, crash_at=3)
    killed = torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)
    assert killed["step"] == 3
    with (tmp_path / "b" / "log.jsonl").open("a") as log:  # it went on after its last checkpoint
        log.write('{"step": 4, "loss": 7.0}\n{"step": 6, "lo')
    resumed = torch.load(run(photos, tmp_path / "b", 16, monkeypatch), weights_only=True)
    assert resumed["step"] == straight["step"]
    for name, value in straight["ema"].items():
        assert torch.allclose(value, resumed["ema"][name], atol=1e-6), name
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert {"step", "seconds", "lr", "loss", "bpp", "psnr"} <= lines[0].keys()
    again = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in again] == [line["step"] for line in lines]
    assert again[1]["loss"] != 7
    assert all(("clean_psnr" in line) is ("clean_bpp" in line) and line.get("clean_psnr") != 0 for line in lines)


def test_a_finished_run_and_a_mean_of_runs_train_no_further(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = run(photos, tmp_path / "a", 2, monkeypatch)
    before = checkpoint.read_bytes()
    assert run(photos, tmp_path / "a", 2, monkeypatch) == checkpoint
    assert checkpoint.read_bytes() == before
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    with pytest.raises(ValueError, match="another output"):
        average(checkpoint, [(1.0, checkpoint)], checkpoint)
    with pytest.raises(ValueError, match="another output"):
        soup(checkpoint, [], photos, checkpoint, minutes=1)
    assert checkpoint.read_bytes() == before
    average(checkpoint, [(1.0, checkpoint)], tmp_path / "mean" / "checkpoint.pt")
    with pytest.raises(ValueError, match="a mean of runs"):
        run(photos, tmp_path / "mean", 4, monkeypatch)


def test_kept_weights_start_a_run_where_the_old_one_ended(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = run(photos, tmp_path / "run", 4, monkeypatch)
    keep_weights(checkpoint, tmp_path / "tiny.safetensors")
    kept, mean = read_weights(tmp_path / "tiny.safetensors"), read_weights(checkpoint)
    assert kept.keys() == mean.keys()
    for name, value in mean.items():
        assert torch.allclose(kept[name], value, rtol=2e-3, atol=1e-5), name
    TrainableCodec(TINY).load_state_dict(kept)
    assert (tmp_path / "tiny.safetensors").stat().st_size < checkpoint.stat().st_size / 4
    started = weights_to_start_from(tmp_path / "tiny.safetensors", TINY)  # it knows the range of lambda
    assert all(torch.equal(started[name], value) for name, value in kept.items())
    save_file(kept, tmp_path / "older.safetensors")  # which the first files did not say
    older = weights_to_start_from(tmp_path / "older.safetensors", TINY)
    assert not torch.equal(older["g_a.gain.log_low"], kept["g_a.gain.log_low"])


def test_the_entropy_model_learns_alone_and_may_grow(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(photos, tmp_path / "two", 4, monkeypatch)
    second = run(photos, tmp_path / "four", 4, monkeypatch, config=FOUR_PASSES, start_from=first, only="prior|h_a|z_")
    was, now = read_weights(first), read_weights(second)
    for name, value in now.items():
        if name in was and name.startswith(("g_a.", "g_s.", "prior.deviation")):
            assert torch.equal(value, was[name]), name
        elif name.endswith("weight"):
            assert not torch.equal(value, was[name.replace("third", "second").replace("fourth", "second")]), name
    assert {"prior.layers.third_merge.weight", "prior.layers.fourth_hidden.bias_low"} <= now.keys()
    assert not {name for name in now if name.startswith("prior.layers.third_mean")}
    third = run(
        photos, tmp_path / "one", 4, monkeypatch, config=FOUR_PASSES, start_from=first, only="prior.layers.fourth"
    )
    grown, learned = weights_to_start_from(first, FOUR_PASSES), read_weights(third)
    changed = {name for name, value in learned.items() if not torch.equal(value, grown[name])}
    assert {name.removeprefix("prior.layers.").split("_")[0] for name in changed} == {"fourth"}
    with pytest.raises(ValueError, match="trains the same parameters"):
        run(photos, tmp_path / "one", 5, monkeypatch, config=FOUR_PASSES, only="prior")
    with pytest.raises(ValueError, match="today's tiny"):
        run(photos, tmp_path / "two", 5, monkeypatch, config=FOUR_PASSES)
    with pytest.raises(ValueError, match="names of parameters, got nothing"):
        run(photos, tmp_path / "none", 4, monkeypatch, only="nothing")
    draw(tmp_path / "four" / "log.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as drawn:
        assert min(drawn.size) > 100
    line = json.loads((tmp_path / "four" / "log.jsonl").read_text().splitlines()[-1])
    assert "bpp" in line
    assert "psnr" not in line


def test_a_grown_prior_starts_with_its_second_pass(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = run(photos, tmp_path / "run", 2, monkeypatch)
    started = weights_to_start_from(checkpoint, FOUR_PASSES)
    TrainableCodec(FOUR_PASSES).load_state_dict(started)
    for step in ("third", "fourth"):
        for name, value in started.items():
            if name.startswith(f"prior.layers.{step}_"):
                assert torch.equal(value, started[name.replace(step, "second")])
    assert weights_to_start_from(checkpoint, TINY).keys() == read_weights(checkpoint).keys()


def test_a_branch_that_an_ablation_silences_stays_silent(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = read_weights(run(photos, tmp_path / "run", 4, monkeypatch, prepare=_silence("content")))
    outs = [value for name, value in weights.items() if name.endswith("content.out.weight")]
    assert outs
    assert not any(value.any() for value in outs)


def test_a_run_with_other_lambdas_is_not_resumed(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = run(photos, tmp_path / "run", 2, monkeypatch)
    state = torch.load(checkpoint, weights_only=True)
    del state["record"]["lambda_low"], state["record"]["lambda_high"]
    torch.save(state, checkpoint)
    with pytest.raises(ValueError, match="lambda"):
        run(photos, tmp_path / "run", 4, monkeypatch)


def test_a_batch_of_one_kind_spreads_over_the_rate_points(photos: Path) -> None:
    pool = PhotoPool(photos, 64, CPU)
    alike, mixed = (islice(Batches(pool, 4, 64, CPU, seed=1, one_kind=one_kind), 12) for one_kind in (True, False))
    kinds = [set(data.kinds) for data in alike]
    assert {len(one) for one in kinds} == {1}
    assert len(set.union(*kinds)) > 3
    assert max(len(set(data.kinds)) for data in mixed) > 2
    data = next(iter(Batches(pool, 4, 64, CPU, seed=2, one_kind=True)))
    assert sorted((data.rate // 2).tolist()) == [0, 1, 2, 3]


def test_only_h_a_learns_to_hold_z_steady(photos: Path) -> None:
    torch.manual_seed(6)
    model = TrainableCodec(TINY).train()
    data = next(iter(Batches(PhotoPool(photos, 64, CPU), 2, 64, CPU, seed=1)))
    out = model(data.clean, data.rate)

    def unsteadiness() -> torch.Tensor:
        torch.manual_seed(7)
        return one_step._unsteadiness(model, out, data.rate)

    before = unsteadiness()
    before.backward()
    learning = {name: weight for name, weight in model.named_parameters() if weight.grad is not None}
    assert learning.keys() == {f"h_a.{name}" for name, _ in model.h_a.named_parameters()}
    slopes = [cast(torch.Tensor, weight.grad) for weight in learning.values()]
    step = 0.1 * before.detach() / torch.stack([slope.square().sum() for slope in slopes]).sum()
    with torch.no_grad():
        for weight, slope in zip(learning.values(), slopes):
            weight.sub_(step * slope)
    assert unsteadiness() < before


def test_the_entropy_model_learns_as_much_beside_a_steep_gradient(photos: Path) -> None:
    """One clip for all would leave it a tenth, where the transforms' gradient is ten times as long."""
    data = next(iter(Batches(PhotoPool(photos, 64, CPU), 2, 64, CPU, seed=1)))

    def learned_from(steeper: float) -> tuple[torch.Tensor, float]:
        torch.manual_seed(6)
        model = TrainableCodec(TINY).train()
        weight = model.get_parameter("prior.layers.enter.weight")
        transforms = [*model.g_a.parameters(), *model.g_s.parameters()]
        for parameter in transforms:
            parameter.register_hook(lambda grad: grad * steeper)
        entropy = [*model.prior.parameters(), *model.z_prior.parameters(), *model.h_a.parameters()]
        optimizer = torch.optim.Adam([{"params": transforms}, {"params": entropy}], fused=True)
        one = one_step.Step(model, optimizer, train_transforms=True, bf16=False)
        one(data.degraded, data.clean, data.rate, 0.0)
        assert weight.grad is not None
        return weight.grad, float(one.sums[one_step.FIGURES.index("grad_norm")])

    (usual, norm), (beside, steep) = learned_from(1), learned_from(1000)
    assert steep == pytest.approx(1000 * norm, rel=1e-3)
    assert usual.any()
    assert torch.equal(usual, beside)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_changes_nothing(photos: Path, wrong: float) -> None:
    data = next(iter(Batches(PhotoPool(photos, 64, CPU), 2, 64, CPU, seed=1)))
    torch.manual_seed(6)
    model = TrainableCodec(TINY).train()
    transforms = [*model.g_a.parameters(), *model.g_s.parameters()]
    entropy = [*model.prior.parameters(), *model.z_prior.parameters(), *model.h_a.parameters()]
    optimizer = torch.optim.Adam([{"params": transforms}, {"params": entropy}], fused=True)
    one = one_step.Step(model, optimizer, train_transforms=True, bf16=False)
    one(data.degraded, data.clean, data.rate, 0.0)
    before = [weight.detach().clone() for weight in model.parameters()]
    spoilt = transforms[0].register_hook(lambda grad: grad * wrong)
    one(data.degraded, data.clean, data.rate, 0.0)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters()))
    assert float(one.sums[one_step.FIGURES.index("dropped")]) == 1
    spoilt.remove()
    one(data.degraded, data.clean, data.rate, 0.0)
    assert not torch.equal(before[0], next(model.parameters()))


def test_a_trainer_that_slept_has_not_trained(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = torch.load(run(photos, tmp_path / "run", 30, monkeypatch, tick=1000.0), weights_only=True)
    assert (checkpoint["step"], checkpoint["seconds"]) == (3, 30)


def test_a_short_run_warms_up_for_a_twentieth_of_its_time() -> None:
    schedule = Schedule(minutes=10, lr=1e-4, prior_lr=1e-4, steady=0.5)
    assert schedule.factor(15, 9) == pytest.approx(0.5)  # few slow steps
    assert schedule.factor(1, 99) == pytest.approx(0.5)  # many fast ones
    assert schedule.factor(30, 20) == 1
    assert schedule.factor(450, 5000) == pytest.approx(0.5)


def test_a_run_draws_a_seed_and_keeps_it(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    for folder, steps in (("a", 2), ("a", 4), ("b", 2)):
        checkpoint = run(photos, tmp_path / folder, steps, monkeypatch, seed=None)
        seeds.append(torch.load(checkpoint, weights_only=True)["record"]["seed"])
    first, resumed, other = seeds
    assert first == resumed != other


def test_the_compiled_prior_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    model, x, rate = TrainableCodec(FOUR_PASSES), torch.rand(2, 3, 64, 64), torch.tensor([1, 6])

    def bits_and_slopes() -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(7)
        model.zero_grad()
        out = model.code(x, rate)
        (out.y_bits.sum() + out.y_hat.square().sum()).backward()
        return out.y_bits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    bits, slopes = bits_and_slopes()
    for module, name in ((prior, "depthwise"), (prior, "pointwise"), (codec_model, "gaussian_bits")):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that it is put back
    compile_prior(model, "aot_eager")
    again, steeps = bits_and_slopes()
    assert torch.equal(bits, again)
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(slopes, steeps, strict=True))


def test_a_stretched_model_is_the_same_at_the_same_lambda(parrots: Photo) -> None:
    torch.manual_seed(5)
    model, other = TrainableCodec(TINY).eval(), TrainableCodec(TINY).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    low, high = 80.0, 5000.0
    step = (high / low) ** (1 / 7)
    other.load_state_dict(stretched(model.state_dict(), (low, high), (low / step, high / step)))
    x = torch.from_numpy(parrots[:64, :64].copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        was, now = model(x, torch.tensor([3])), other(x, torch.tensor([4]))
    torch.testing.assert_close(now.x_hat, was.x_hat, rtol=1e-4, atol=1e-4)
    assert float(now.z_bits) == pytest.approx(float(was.z_bits), rel=1e-4)
    assert float(now.y_bits) == pytest.approx(float(was.y_bits), rel=1e-3)
    assert float(now.y_bits) > 0
    assert other.g_a.gain.log_low.sub(model.g_a.gain.log_low).abs().max() > 1e-3


def test_balanced_distortion_is_mse_below_tau_and_smooth_at_it() -> None:
    weight = torch.tensor([1000.0])
    tau = 2 / 1000
    assert float(balanced_distortion(torch.tensor([tau / 3]), weight)) == pytest.approx(tau / 3)
    below, above = (float(balanced_distortion(torch.tensor([tau * f]), weight)) for f in (0.999, 1.001))
    assert (above - below) / (0.002 * tau) == pytest.approx(1, abs=0.01)
    assert float(balanced_distortion(torch.tensor([100 * tau]), weight)) < 6 * tau


def test_lambdas_are_log_spaced_over_the_rate_points() -> None:
    weights = rate_lambda(torch.arange(8))
    assert float(weights[0]) == pytest.approx(LAMBDA_RANGE[0])
    assert float(weights[-1]) == pytest.approx(LAMBDA_RANGE[1], rel=1e-4)
    ratios = weights[1:] / weights[:-1]
    assert float(ratios.std()) < 1e-3


def test_a_folder_without_photos_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        PhotoPool(tmp_path, 160, CPU)


@pytest.mark.parametrize("wrong", ["cut.jpg", "deep.png"])
def test_a_photo_that_cannot_be_learned_from_is_named(photos: Path, parrots: Photo, wrong: str) -> None:
    if wrong == "cut.jpg":
        (photos / wrong).write_bytes(image_bytes(parrots, "JPEG")[:2000])
    else:
        Image.fromarray(parrots[..., 0].astype(np.uint16) * 257).save(photos / wrong)
    with pytest.raises(ValueError, match=f"{wrong}: "):
        PhotoPool(photos, 64, CPU)


def test_toned_photos_are_such_as_can_be_uploaded(photos: Path) -> None:
    seed = torch.Generator().manual_seed(1)
    toned = tone_jittered(PhotoPool(photos, 64, CPU).crops(8, 64, seed), seed, 1.0)
    assert torch.allclose(toned * 255, (toned * 255).round(), atol=1e-3)


def test_photos_that_models_are_measured_on_are_not_learned_from(
    photos: Path, monkeypatch: pytest.MonkeyPatch, bikes: Photo
) -> None:
    lines = held_out.FILE.read_text().split()
    assert len(lines) == 110
    assert np.packbits(held_out._known(), 1).tobytes().hex() == "".join(lines)
    of_bikes = np.packbits(held_out.fingerprint(Image.fromarray(bikes))).tobytes().hex()
    assert of_bikes == "36341a3c9d15213135abb0d3d0f4483d623ae707b3f8719c61cf254ff14f1c13", (
        "the list would no longer know its photos"
    )
    assert len(PhotoPool(photos, 64, CPU).photos) == 4  # two photos, and each at half its size
    known = held_out.fingerprint(Image.fromarray(bikes))[None]
    monkeypatch.setattr(held_out, "_known", lambda: known)
    Image.fromarray(bikes[:, ::-1]).resize((150, 125)).save(photos / "mirrored.jpg", quality=60)
    assert len(PhotoPool(photos, 64, CPU).photos) == 2
    for way in Image.Transpose:
        assert held_out.is_held_out(Image.fromarray(bikes).transpose(way)), way
    (photos / "mirrored.jpg").unlink()
    exif = Image.Exif()
    exif[0x112] = 6
    turned = Image.fromarray(bikes).transpose(Image.Transpose.ROTATE_90)
    turned.save(photos / "turned.jpg", exif=exif)
    assert len(PhotoPool(photos, 64, CPU).photos) == 2
