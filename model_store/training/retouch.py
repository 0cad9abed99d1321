"""`python -m model_store.training.retouch`: teach a trained encoder something more without unlearning the rest.

A model that learned from photographs alone takes plain grey for fog and brightens it to white, and a stage that draws
one kind of damage more often loses others. Here g_a learns drawn pictures, and kinds of damage if asked, through
everything else at rest, while on photographs of all other kinds it is held to the latents that it made before
(knowledge distillation as in Li & Hoiem, "Learning without forgetting", ECCV 2016). So the decoder and the entropy
model stay as they are, and nearly so what is known of the model on those kinds. How far its latents moved there is
logged as `held`, a mean squared distance in steps; rounding alone makes 1/12.
"""

from __future__ import annotations

import argparse
import copy
import json
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from model_store.degradations import Kind
from model_store.training.batches import KIND_SHARES, Batches
from model_store.training.drawings import DRAWN_SHARES, Drawings
from model_store.training.loop import CHECKPOINT_SECONDS
from model_store.training.photos import PhotoPool, check_crop
from model_store.training.schedule import Schedule
from model_store.training.step import Ema, clipped, costs
from model_store.training.weights import check_output, named, weights_to_start_from, write_mixed
from service.codec.config import CONFIGS
from service.codec.device import pick_device
from service.codec.model import TrainableCodec

HOLD = 50.0
"""Weight of `held` beside the logarithm of what the pictures to learn cost, unless another is asked for."""

LEARNABLE = tuple(kind for kind in KIND_SHARES if kind not in (Kind.CLEAN, Kind.JPEG))
"""Clean photographs are held; JPEG's damage lies on a tenth of all."""

_DRAWN_EVERY = 3
"""One step of so many learns from drawn pictures where there are kinds of damage to learn."""

_DRAWN_SIDES, _DRAWN_PIXELS = (32, 64, 128, 224, 320), 2 * 224**2
"""Sides of drawn pictures (attention sees all of a picture, so its size matters) and most pixels of a batch of them."""

_ENOUGH = 0.1
"""Bits per pixel of lambda D + R below which a picture is good enough: plain ones come to 0.02."""

_HELD_TONED = 0.7
"""Share of the held photographs that are dim, bright or dull: whoever learns darkness or haze takes them for it."""

_MOST_DRAWN = 8

_LOG_EVERY = 25

_FIGURES = ("learned", "held", "grad_norm")
"""Of so many steps, means: the logarithm of what is learned costs, the distance of latents, the gradient's norm."""


def retouch(
    start_from: Path,
    photos: Path,
    output: Path,
    *,
    size: str,
    minutes: float,
    learn: Sequence[Kind] = (),
    held_to: Path | None = None,
    hold: float = HOLD,
    lr: float = 1e-4,
    batch: int = 4,
    crop: int = 224,
    seed: int | None = None,
) -> Path:
    """Train g_a for some minutes. Returns `output`, a checkpoint without an optimizer; its log lies beside it.

    Args:
        start_from: weights of a run, of this size.
        learn: of `LEARNABLE`, besides drawn pictures, each as often as the others.
        held_to: the model that photographs are held to; that of `start_from`, unless it is a retouch to go on from.
        hold: the weight of that.
        batch, crop: of the photographs of a step; drawn pictures have up to 100,000 pixels a batch, whatever these are.

    Raises:
        ValueError: no usable photos, a crop that is no multiple of 16, kinds that cannot be learned or too many to hold
            others, or an output that is what it starts from.
    """
    check_crop(crop)
    learn = tuple(dict.fromkeys(learn))
    if not set(learn) <= set(LEARNABLE) or len(learn) > len(LEARNABLE) - 2:
        raise ValueError(f"expected kinds of {', '.join(LEARNABLE)}, not nearly all, got {', '.join(learn)}")
    held_to = held_to or start_from
    check_output(output, start_from, held_to)
    where = pick_device("auto")
    seed = secrets.randbelow(2**31) if seed is None else seed
    torch.manual_seed(seed)
    model = TrainableCodec(CONFIGS[size])
    model.load_state_dict(weights_to_start_from(held_to, model.config))
    model.to(where).to(memory_format=torch.channels_last).requires_grad_(False)
    before = copy.deepcopy(model.g_a)
    begun = weights_to_start_from(start_from, model.config)
    # But for its gain, which integers of the entropy model follow.
    learned = {name: w for name, w in begun.items() if name.startswith("g_a.") and not name.startswith("g_a.gain.")}
    model.load_state_dict(learned, strict=False)
    model.g_a.requires_grad_(True)
    model.g_a.gain.requires_grad_(False)
    learning = [parameter for parameter in model.g_a.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=lr, betas=(0.9, 0.98))
    pool, ema = PhotoPool(photos, crop, where), Ema(model)
    others = {kind: share for kind, share in KIND_SHARES.items() if kind not in learn}
    scale = sum(KIND_SHARES.values()) / sum(others.values())  # mixtures stay as rare as they were
    shares = {kind: share * scale for kind, share in others.items()}
    photographs = iter(Batches(pool, batch, crop, where, seed, shares, toned=_HELD_TONED))
    wrong = dict.fromkeys(learn, 1 / max(1, len(learn)))
    damaged = iter(Batches(pool, batch, crop, where, seed + 4, wrong, one_kind=True))
    drawings = Batches(Drawings(where), 1, crop, where, seed + 2, DRAWN_SHARES)
    drawn = iter(drawings)
    schedule = Schedule(minutes, lr, 0.0, 0.3)
    output.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        record = {
            "batch": batch, "crop": crop, "seed": seed, "photos": len(pool.photos), "device": str(where),
            "only": "g_a", "retouched": named(start_from), "held_to": named(held_to),
            "learn": ", ".join(learn), "minutes": minutes, "lr": lr, "hold": hold,
        }  # fmt: skip
        write_mixed({"size": size, "step": step, "seconds": seconds, "record": record}, ema.mean, output)

    bar = tqdm(total=round(60 * minutes), unit="s", mininterval=5)
    start = saved = time.monotonic()
    step, seconds, sums = 0, 0.0, torch.zeros(3)
    model.train()
    with output.with_name("retouch.jsonl").open("w") as log:
        while seconds < 60 * minutes:
            optimizer.param_groups[0]["lr"] = lr * schedule.factor(seconds, step)
            drawings.crop = _DRAWN_SIDES[int(torch.randint(len(_DRAWN_SIDES), ()))]
            drawings.size = min(_MOST_DRAWN, max(1, _DRAWN_PIXELS // drawings.crop**2))
            picture = next(damaged if learn and step % _DRAWN_EVERY else drawn)
            photo = next(photographs)
            cost = costs(model(picture.degraded, picture.rate), picture.clean, picture.rate)[0]
            with torch.no_grad():
                wanted = before(photo.degraded, photo.rate)
            held = (model.g_a(photo.degraded, photo.rate) - wanted).square().mean()
            loss = (cost + _ENOUGH).log().mean() + hold * held
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = clipped(learning, where)
            if norm.isfinite():
                optimizer.step()
            ema.update(step)
            step, seconds = step + 1, time.monotonic() - start
            sums += torch.stack([cost.detach().log().mean(), held.detach(), norm]).cpu()
            bar.update(round(seconds) - bar.n)
            if step % _LOG_EVERY == 0:
                told = dict(zip(_FIGURES, (sums / _LOG_EVERY).tolist()))
                sums.zero_()
                log.write(json.dumps({"step": step, "seconds": round(seconds), **told}) + "\n")
                log.flush()
                bar.set_description(f"step {step}  held {told['held']:.4f}", refresh=False)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save()
                saved = time.monotonic()
    bar.close()
    save()
    return output


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.training.retouch", description=__doc__)
    parser.add_argument("start_from", type=Path, help="weights of a run")
    parser.add_argument("--size", choices=CONFIGS, required=True)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs, searched recursively")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint.pt that it becomes")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--learn", nargs="+", choices=[*LEARNABLE], default=[], help="besides drawn pictures")
    parser.add_argument("--held-to", type=Path, help="weights that photographs are held to, if not what it starts from")
    parser.add_argument("--hold", type=float, default=HOLD, help="how hard, default %(default)s")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    print(retouch(**{**vars(args), "learn": [Kind(name) for name in args.learn]}))


if __name__ == "__main__":
    main()
