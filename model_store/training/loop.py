"""The training loop: steps over a budget of time, checkpoints and the log of one run."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model_store.degradations import Kind
from model_store.index import replace_file
from model_store.training.batches import Batches
from model_store.training.compiled import compile_blocks, compile_prior
from model_store.training.photos import PhotoPool, check_crop
from model_store.training.schedule import Schedule
from model_store.training.step import FIGURES, Ema, Step
from model_store.training.warm_start import warm_start
from model_store.training.weights import save_checkpoint, trained_lambdas, weights_to_start_from
from service.codec.config import CONFIGS, LAMBDA_RANGE
from service.codec.device import pick_device, transform_precision
from service.codec.model import TrainableCodec

LOG_EVERY = 50
CHECKPOINT_SECONDS = 180


def _groups(model: TrainableCodec, schedule: Schedule) -> list[dict[str, object]]:
    prior = [*model.prior.parameters(), *model.z_prior.parameters(), *model.h_a.parameters()]
    known = set(map(id, prior))
    transforms = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [{"params": transforms, "base": schedule.lr}, {"params": prior, "base": schedule.prior_lr}]


def _told(sums: Tensor, train_transforms: bool) -> dict[str, float]:
    """A line of the log from a `Step`'s sums."""
    line = dict(zip(FIGURES, sums.tolist()))
    count, clean = line.pop("count"), line.pop("clean")
    means = {name: value / (clean if name.startswith("clean") else count) for name, value in line.items()
             if clean or not name.startswith("clean")}  # fmt: skip
    return {name: value for name, value in means.items() if train_transforms or not name.endswith("psnr")}


def _forget_after(step: int, log: Path) -> None:
    """Take from a log what was written after the checkpoint of `step`, and a line that was cut: both come again."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    kept = "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
    replace_file(log, kept.encode())


def train(
    *,
    photos: Path,
    run: Path,
    size: str,
    schedule: Schedule,
    batch: int,
    crop: int,
    seed: int | None,
    device: str | None = None,
    compiled: bool = True,
    start_from: Path | None = None,
    warm: bool = True,
    only: str = "",
    prepare: Callable[[TrainableCodec], None] | None = None,
) -> Path:
    """Train or resume until the schedule's time is used up. Returns the path of the last checkpoint.

    Args:
        seed: of all that is drawn; None draws one. A run that goes on goes on drawing from its own.
        start_from: weights to start from; else the start is warm, or with `warm` off random.
        only: what the names of the parameters that learn begin with, a regular expression. Where it leaves the
            transforms as they are, the entropy model learns alone, in a fraction of the time.
        prepare: is shown the model before its first step.

    Raises:
        ValueError: no usable photos, nothing that could learn, a crop that is no multiple of 16, or a run with another
            range of lambda, on another kind of device, or that is a mean of runs.
    """
    check_crop(crop)
    where = pick_device(device or "auto")
    bf16 = transform_precision(where) == "bfloat16"  # emulated where the hardware lacks it: ten times slower
    run.mkdir(parents=True, exist_ok=True)
    path = run / "checkpoint.pt"
    seed = secrets.randbelow(2**31) if seed is None else seed
    torch.manual_seed(seed)
    pool = PhotoPool(photos, crop, where)
    model = TrainableCodec(CONFIGS[size]).to(where)
    model.to(memory_format=torch.channels_last)
    names = [name for name, _ in model.named_parameters()]
    frozen = [name for name in names if not re.match(only, name)]
    if len(frozen) == len(names):
        raise ValueError(f"expected a pattern of names of parameters, got {only}")
    if not path.exists():
        if start_from:
            model.load_state_dict(weights_to_start_from(start_from, model.config))
        elif warm:
            warm_start(model, pool)
    if prepare:
        prepare(model)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    train_transforms = any(
        parameter.requires_grad for part in (model.g_a, model.g_s) for parameter in part.parameters()
    )
    captured = where.type == "cuda"
    optimizer = torch.optim.Adam(_groups(model, schedule), betas=(0.9, 0.98), fused=True, capturable=captured)
    batches, ema = Batches(pool, batch, crop, where, seed, one_kind=True), Ema(model)
    step, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=where, weights_only=True)
        if trained_lambdas(state["record"]) != LAMBDA_RANGE:
            raise ValueError(f"expected a run with lambda from {LAMBDA_RANGE[0]:g} to {LAMBDA_RANGE[1]:g} in {run}; "
                             "start another one from its weights (--start-from)")  # fmt: skip
        if "optimizer" not in state or torch.device(state["record"]["device"]).type != where.type:
            raise ValueError(f"expected a run on {where.type} in {run}, not one of another device or a mean of runs; "
                             "start another one from its weights (--start-from)")  # fmt: skip
        if state["model"].keys() != model.state_dict().keys() or state["record"].get("only", "") != only:
            raise ValueError(f"expected a run of today's {size} that trains the same parameters in {run}; "
                             "start another one from its weights (--start-from)")  # fmt: skip
        model.load_state_dict(state["model"])
        ema.mean = state["ema"]
        optimizer.load_state_dict(state["optimizer"])
        for group, base in zip(optimizer.param_groups, (schedule.lr, schedule.prior_lr)):
            group["base"], group["capturable"] = base, captured
        batches.restore(state["random"])
        torch.set_rng_state(state["noise"].cpu())
        if where.type == "cuda":
            torch.cuda.set_rng_state(state["device_noise"].cpu(), where)
        step, seconds, seed = state["step"], state["seconds"], state["record"]["seed"]
        if seconds >= 60 * schedule.minutes:
            return path
    if compiled and bf16:  # in float32 on a CPU, what is compiled is a sixth slower (measured with AVX2)
        compile_blocks(model)
        if captured:
            compile_prior(model)
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros((), device=where)  # where a captured step finds it

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
        save_checkpoint(state, path)

    _forget_after(step, run / "log.jsonl")
    log = (run / "log.jsonl").open("a")
    bar = tqdm(total=round(60 * schedule.minutes), initial=round(seconds), unit="s", dynamic_ncols=True, mininterval=1)
    last, saved = time.monotonic(), time.monotonic()
    model.train()
    learn = Step(model, optimizer, train_transforms, bf16)
    for data in batches:
        factor = schedule.factor(seconds, step)
        for group in optimizer.param_groups:
            group["lr"].fill_(group["base"] * factor)
        clean = sum(kinds == (Kind.CLEAN,) for kinds in data.kinds)
        learn(data.degraded, data.clean, data.rate, clean / batch)
        ema.update(step)
        step += 1
        now = time.monotonic()
        seconds, last = seconds + min(now - last, 10.0), now  # a trainer stopped for a while has not trained
        bar.update(round(seconds) - bar.n)
        done = seconds >= 60 * schedule.minutes
        if done or step % LOG_EVERY == 0:
            line = _told(learn.sums, train_transforms)
            learn.sums.zero_()
            log.write(json.dumps({"step": step, "seconds": round(seconds), "lr": factor * schedule.lr, **line}) + "\n")
            log.flush()
            quality = f"  {line['psnr']:.2f} dB" if "psnr" in line else ""
            bar.set_description(f"step {step}  {line['bpp']:.3f} bpp{quality}", refresh=False)
        if done or now - saved > CHECKPOINT_SECONDS:
            save()
            saved = time.monotonic()
        if done:
            break
    bar.close()
    log.close()
    return path
