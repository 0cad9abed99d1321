"""The training loop: batches, steps, the running mean of the weights (EMA), checkpoints and the log of one run."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from model_store.degradations import TRAINING, Kind, degrade_measured
from model_store.training.loss import LAMBDA_RANGE, balanced_distortion, rate_lambda
from model_store.training.photos import PhotoPool, toned
from model_store.training.warm_start import warm_start
from model_store.training.weights import trained_lambdas, weights_to_start_from
from service.codec.config import CONFIGS, RATE_POINTS
from service.codec.device import pick_device, transform_precision
from service.codec.model import CodecOutput, CodedLatents, TrainableCodec

KIND_SHARES: dict[Kind, float] = {
    Kind.CLEAN: 0.24,
    Kind.NOISE: 0.18,
    Kind.SENSOR_NOISE: 0.12,
    Kind.RAIN: 0.22,
    Kind.SNOW: 0.08,
    Kind.HAZE: 0.05,
    Kind.LOW_LIGHT: 0.06,
    Kind.BLUR: 0.02,
    Kind.JPEG: 0.02,
}
"""How often each kind is drawn alone; what is left to 1 are mixtures of two."""

UPLOAD_JPEG = 0.1
"""Share of the degraded photos that arrive as JPEG besides, as gateways send them."""

STEADY_WEIGHT, STEADY_NOISE = 0.5, 0.05
"""z of the rounded latents, as a later generation sees them, shall be z of the latents: it decides their rounding.
The weight is that of the mean squared distance between the two; the noise, in steps, is what g_s and g_a may lose."""

LOG_EVERY = 50
CHECKPOINT_SECONDS = 180
WARM_UP_STEPS = 200
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Schedule:
    """Learning rates over a budget of time: a steady share, then a linear decay to 2%."""

    minutes: float
    lr: float
    prior_lr: float
    steady: float

    def factor(self, seconds: float, step: int) -> float:
        progress = seconds / (60 * self.minutes)
        decay = 1.0 if progress < self.steady else max(0.02, (1 - progress) / (1 - self.steady))
        return min(1.0, (step + 1) / WARM_UP_STEPS) * decay


@dataclass(frozen=True)
class Batch:
    """Degraded photos, their clean originals, both (B, 3, H, W), the rate index of each, (B,), and what was done."""

    degraded: Tensor
    clean: Tensor
    rate: Tensor
    kinds: list[tuple[Kind, ...]]
    harm: list[dict[Kind, float]]


class Batches:
    """Endless batches; all randomness comes from two generators whose state a checkpoint keeps.

    Args:
        alike: one kind per batch. A hazy photo's gradient is 13 times as long as a clean one's; of both in one batch,
            clipped, next to nothing of the latter would be left.
    """

    def __init__(
        self, pool: PhotoPool, size: int, crop: int, device: torch.device, seed: int,
        shares: Mapping[Kind, float] = KIND_SHARES, alike: bool = False,
    ) -> None:  # fmt: skip
        self.pool, self.size, self.crop, self.device = pool, size, crop, device
        self.shares, self.alike = shares, alike
        self.choices = torch.Generator().manual_seed(seed)
        self.damage = torch.Generator(device).manual_seed(seed + 1)

    def state(self) -> dict[str, Tensor]:
        return {"choices": self.choices.get_state(), "damage": self.damage.get_state().cpu()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.choices.set_state(state["choices"].cpu())
        self.damage.set_state(state["damage"].cpu())

    def _kinds(self) -> tuple[Kind, ...]:
        kinds = self._camera_kinds()
        sent_as_jpeg = float(torch.rand(1, generator=self.choices)) < UPLOAD_JPEG
        return (*kinds, Kind.JPEG) if sent_as_jpeg and kinds != (Kind.CLEAN,) else kinds

    def _camera_kinds(self) -> tuple[Kind, ...]:
        single = list(self.shares)
        shares = torch.tensor([*self.shares.values(), 1 - sum(self.shares.values())])
        choice = int(torch.multinomial(shares, 1, generator=self.choices))
        if choice < len(single):
            return (single[choice],)
        damaged = [kind for kind in single if kind is not Kind.CLEAN]
        pair = torch.multinomial(torch.ones(len(damaged)), 2, generator=self.choices).tolist()
        return tuple(damaged[index] for index in pair)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            clean = toned(self.pool.crops(self.size, self.crop, self.choices), self.choices)
            kinds = [self._kinds()] * self.size if self.alike else [self._kinds() for _ in range(self.size)]
            # Stratified: every batch spreads over the rate points.
            start = torch.rand(1, generator=self.choices)
            spread = (torch.arange(self.size) + start) / self.size
            rate = (spread * RATE_POINTS).long().clamp_max(RATE_POINTS - 1)
            rate = rate[torch.randperm(self.size, generator=self.choices)].to(self.device)
            degraded, harm = degrade_measured(clean, kinds, self.damage, TRAINING)
            yield Batch(degraded, clean, rate, kinds, harm)


class Ema:
    """A running mean of the parameters; it is what ships."""

    def __init__(self, model: nn.Module) -> None:
        self.mean = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        for name, value in model.state_dict().items():
            self.mean[name].lerp_(value, 1 - decay)


def _groups(model: TrainableCodec, schedule: Schedule) -> list[dict[str, object]]:
    prior = [*model.prior.parameters(), *model.z_prior.parameters(), *model.h_a.parameters()]
    known = set(map(id, prior))
    transforms = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [{"params": transforms, "base": schedule.lr}, {"params": prior, "base": schedule.prior_lr}]


def _unsteadiness(model: TrainableCodec, out: CodedLatents, rate: Tensor) -> Tensor:
    """The mean squared distance between z of y and z of y_hat, a little off. Only h_a learns from it."""
    y_hat = out.y_hat.detach()
    with torch.no_grad():
        seen = [model.normalise(y, rate) for y in (out.y, y_hat + STEADY_NOISE * torch.randn_like(y_hat))]
    first, again = (model.h_a(y) for y in seen)
    return (first - again).square().mean()


def train(
    *,
    photos: Path,
    run: Path,
    size: str,
    schedule: Schedule,
    batch: int,
    crop: int,
    seed: int,
    device: str | None = None,
    compile_blocks: bool = True,
    start_from: Path | None = None,
    warm: bool = True,
    only: str = "",
    prepare: Callable[[TrainableCodec], None] | None = None,
) -> Path:
    """Train or resume until the schedule's time is used up. Returns the path of the last checkpoint.

    Args:
        start_from: weights to start from; else the start is warm, or with `warm` off random.
        only: what the names of the parameters that learn begin with, a regular expression. Where it leaves the
            transforms as they are, the entropy model learns alone, in a fraction of the time.
        prepare: is shown the model before its first step.

    Raises:
        ValueError: no usable photos, nothing that could learn, a crop that is no multiple of 16, or a run with another
            range of lambda.
    """
    if crop % 16:
        raise ValueError(f"expected a crop that is a multiple of 16, got {crop}")
    where = pick_device(device or "auto")
    halved = transform_precision(where) == "bfloat16"  # emulated where the hardware lacks it: ten times slower
    run.mkdir(parents=True, exist_ok=True)
    path = run / "checkpoint.pt"
    torch.manual_seed(seed)
    pool = PhotoPool(photos, crop, where)
    model = TrainableCodec(CONFIGS[size]).to(where)
    model.to(memory_format=torch.channels_last)
    names = [name for name, _ in model.named_parameters()]
    resting = [name for name in names if not re.match(only, name)]
    if len(resting) == len(names):
        raise ValueError(f"expected a pattern of names of parameters, got {only}")
    if not path.exists():
        if start_from:
            model.load_state_dict(weights_to_start_from(start_from, model.config))
        elif warm:
            warm_start(model, pool)
    if prepare:
        prepare(model)
    for name in resting:
        model.get_parameter(name).requires_grad_(False)
    pictures = any(parameter.requires_grad for part in (model.g_a, model.g_s) for parameter in part.parameters())
    optimizer = torch.optim.AdamW(_groups(model, schedule), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    batches, ema = Batches(pool, batch, crop, where, seed, alike=True), Ema(model)
    step, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=where, weights_only=True)
        if trained_lambdas(state["record"]) != LAMBDA_RANGE:
            raise ValueError(f"expected a run with lambda from {LAMBDA_RANGE[0]:g} to {LAMBDA_RANGE[1]:g} in {run}; "
                             "start another one from its weights (--start-from)")  # fmt: skip
        if state["model"].keys() != model.state_dict().keys() or state["record"].get("only", "") != only:
            raise ValueError(f"expected a run of today's {size} that trains the same parameters in {run}; "
                             "start another one from its weights (--start-from)")  # fmt: skip
        model.load_state_dict(state["model"])
        ema.mean = state["ema"]
        optimizer.load_state_dict(state["optimizer"])
        for group, base in zip(optimizer.param_groups, (schedule.lr, schedule.prior_lr)):
            group["base"] = base
        batches.restore(state["random"])
        torch.set_rng_state(state["noise"].cpu())
        if where.type == "cuda":
            torch.cuda.set_rng_state(state["device_noise"].cpu(), where)
        step, seconds = state["step"], state["seconds"]
    if compile_blocks and halved:  # in float32 on a CPU, what is compiled is a sixth slower (measured with AVX2)
        for stack in [*model.g_a.stacks, *model.g_s.stacks]:
            stack.blocks.compile(dynamic=False)

    def save() -> None:
        state = {
            "size": size, "model": model.state_dict(), "ema": ema.mean, "optimizer": optimizer.state_dict(),
            "random": batches.state(), "noise": torch.get_rng_state(),
            "device_noise": torch.cuda.get_rng_state(where) if where.type == "cuda" else None,
            "step": step, "seconds": seconds,
            "record": {"batch": batch, "crop": crop, "seed": seed, "photos": len(pool.photos),
                       "device": str(where), "lambda_low": LAMBDA_RANGE[0], "lambda_high": LAMBDA_RANGE[1],
                       "only": only, **asdict(schedule)},
        }  # fmt: skip
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    log = (run / "log.jsonl").open("a")
    bar = tqdm(total=round(60 * schedule.minutes), initial=round(seconds), unit="s", dynamic_ncols=True, mininterval=1)
    sums: dict[str, float] = {}
    last, saved = time.monotonic(), time.monotonic()
    model.train()
    for data in batches:
        factor = schedule.factor(seconds, step)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        with torch.autocast(where.type, torch.bfloat16, enabled=halved):
            out = model(data.degraded, data.rate) if pictures else model.code(data.degraded, data.rate)
        pixels = crop * crop
        bpp = (out.y_bits + out.z_bits) / pixels
        cost = bpp
        if isinstance(out, CodecOutput):
            mse = (out.x_hat.float() - data.clean).square().mean((1, 2, 3))
            weight = rate_lambda(data.rate)
            cost = cost + weight * balanced_distortion(mse, weight)
        loss = cost.log().mean()  # a percent less counts the same at every rate point
        unsteadiness = _unsteadiness(model, out, data.rate)
        loss = loss + STEADY_WEIGHT * unsteadiness
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        finite = bool(torch.isfinite(norm))
        if finite:  # a step with a broken gradient is dropped
            optimizer.step()
            ema.update(model, step)
        step += 1
        clean = [index for index, kinds in enumerate(data.kinds) if kinds == (Kind.CLEAN,)]
        values = {
            "loss": float(loss.detach()),
            "bpp": float(bpp.detach().mean()),
            "z_bpp": float(out.z_bits.detach().mean()) / pixels,
            "unsteadiness": float(unsteadiness.detach()),
            "grad_norm": float(norm),
            "dropped": float(not finite),
            "count": 1.0,
        }
        if clean:
            values["clean_bpp"] = float(bpp.detach()[clean].sum())
            values["clean"] = float(len(clean))
        if isinstance(out, CodecOutput):
            psnr = -10 * mse.detach().clamp_min(1e-9).log10()
            values["psnr"] = float(psnr.mean())
            if clean:
                values["clean_psnr"] = float(psnr[clean].sum())
        for name, value in values.items():
            if math.isfinite(value):
                sums[name] = sums.get(name, 0.0) + value
        now = time.monotonic()
        seconds, last = seconds + min(now - last, 10.0), now  # a trainer stopped for a while has not trained
        bar.update(round(seconds) - bar.n)
        done = seconds >= 60 * schedule.minutes
        if done or step % LOG_EVERY == 0:
            count, clean_count = sums.pop("count"), max(1.0, sums.pop("clean", 0.0))
            line = {name: value / (clean_count if name.startswith("clean") else count) for name, value in sums.items()}
            log.write(json.dumps({"step": step, "seconds": round(seconds), "lr": factor * schedule.lr, **line}) + "\n")
            log.flush()
            quality = f"  {line['psnr']:.2f} dB" if "psnr" in line else ""
            bar.set_description(f"step {step}  {line['bpp']:.3f} bpp{quality}", refresh=False)
            sums = {}
        if done or now - saved > CHECKPOINT_SECONDS:
            save()
            saved = time.monotonic()
        if done:
            break
    bar.close()
    log.close()
    return path
