"""`python -m model_store.training.report`: train the degradation report of a run's checkpoint.

The encoder is frozen and runs as it will in the service; only the head learns, from the same photos as the codec and
from drawn pictures: plain grey is no haze. What the encoder sees is kept, since seeing takes forty times as long as
learning from it: a head learns from it many times (experience replay, Lin 1992). The result lies beside the checkpoint,
where `model_store.training.export` takes it up.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from tqdm import tqdm

from model_store.degradations import Kind
from model_store.training.batches import Batches
from model_store.training.drawings import DRAWN_SHARES, Drawings
from model_store.training.photos import PhotoPool
from model_store.training.schedule import decay
from model_store.training.weights import config_of, read_weights
from service.codec.bitstream import DegradationKind
from service.codec.config import CodecConfig
from service.codec.device import pick_device, transform_precision
from service.codec.fast import speed_up
from service.codec.model import TrainableCodec
from service.codec.report import HARMLESS, KINDS, SPAN, ReportHead
from service.codec.transforms import Analysis

REPORT_FILE = "report.safetensors"

_ENCODER = "encoder"

REPORTED_AS = {
    Kind.NOISE: DegradationKind.NOISE,
    Kind.SENSOR_NOISE: DegradationKind.NOISE,
    Kind.RAIN: DegradationKind.RAIN,
    Kind.SNOW: DegradationKind.SNOW,
    Kind.HAZE: DegradationKind.HAZE,
    Kind.LOW_LIGHT: DegradationKind.LOW_LIGHT,
    Kind.BLUR: DegradationKind.BLUR,
    Kind.JPEG: DegradationKind.JPEG,
}

REPORT_SHARES = {Kind.CLEAN: 0.2, **dict.fromkeys(REPORTED_AS, 0.085)}
"""How often each kind is drawn alone, more evenly than for the codec: what is rare would hardly ever be named."""

_DRAWN_EVERY = 8
"""One batch of so many is of pictures that are no photographs."""

_KEPT, _REPLAYS = 384, 16
"""Batches that are kept (6.4 MB each for `base`), and how many of them are learned from for every new one."""

_ABSENT, _PRESENT = 42.0, 38.0  # dB that a flaw alone leaves; between them either answer is right


def read_report(path: Path, config: CodecConfig) -> ReportHead:
    """The head that a training left in `path`."""
    head = ReportHead(config)
    head.load_state_dict(load_file(path))
    return head


def record_of(path: Path, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """How the head in `path` last learned, for a model's record.

    Raises:
        ValueError: it learned from another encoder than that of `weights`.
    """
    with safe_open(path, framework="pt") as opened:
        told = dict(opened.metadata() or {})
    if told.pop(_ENCODER, None) != encoder_of(weights):
        raise ValueError(f"expected a head of this encoder in {path}; train it on (model_store.training.report)")
    return told


def encoder_of(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the encoder's weights."""
    encoder = {name: value.contiguous() for name, value in weights.items() if name.startswith("g_a.")}
    return hashlib.sha256(save(encoder)).hexdigest()


def targets(added_mse: list[dict[Kind, float]]) -> tuple[Tensor, Tensor, Tensor]:
    """From the MSE that every kind did: presence, strength and whether presence counts, each (B, 7)."""
    mse = torch.zeros(len(added_mse), len(KINDS))
    for row, kinds in enumerate(added_mse):
        for kind, value in kinds.items():
            mse[row, KINDS.index(REPORTED_AS[kind])] += value
    psnr = -10 * mse.clamp_min(1e-9).log10()
    present, counts = psnr < _PRESENT, (psnr < _PRESENT) | (psnr > _ABSENT)
    return present.float(), ((HARMLESS - psnr) / SPAN).clamp(0, 1), counts.float()


@dataclass(frozen=True)
class Lesson:
    """What the encoder sees of a batch, as float16 feature maps, and what is to be told of it, each (B, 7)."""

    features: list[Tensor]
    present: Tensor
    strength: Tensor
    counts: Tensor

    def loss(self, head: ReportHead) -> Tensor:
        odds, strength = head([head.summary(level, x) for level, x in enumerate(self.features)])
        named = F.binary_cross_entropy_with_logits(odds, self.present, reduction="none")
        return (named * self.counts).mean() + ((strength - self.strength).square() * self.present).mean()


def _seen(g_a: Analysis, photos: Tensor, rate: Tensor) -> list[Tensor]:
    """The feature maps that the head watches."""
    seen: list[Tensor] = []
    with torch.no_grad():
        g_a(photos.contiguous(memory_format=torch.channels_last), rate, lambda _, x: seen.append(x))
    return seen


def learn(head: ReportHead, optimizer: torch.optim.Optimizer, lesson: Lesson) -> float:
    """A step. Returns the loss before it."""
    loss = lesson.loss(head)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def train_report(
    checkpoint: Path, photos: Path, minutes: float, seed: int = 7, lr: float = 3e-3, batch: int = 16, crop: int = 224
) -> Path:
    """Train a head for the EMA weights of a checkpoint, or go on with the one beside it. Returns the head's path."""
    device = pick_device("auto")
    size = torch.load(checkpoint, map_location="cpu", weights_only=True)["size"]
    weights = read_weights(checkpoint)
    encoder = encoder_of(weights)
    model = TrainableCodec(config_of(size, weights))
    model.load_state_dict(weights)
    g_a = model.g_a.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    speed_up(g_a, getattr(torch, transform_precision(device)))
    seen = iter(Batches(PhotoPool(photos, crop, device), batch, crop, device, seed, REPORT_SHARES))
    drawn = iter(Batches(Drawings(device), batch, crop, device, seed + 2, DRAWN_SHARES))
    torch.manual_seed(seed)
    path, first = checkpoint.with_name(REPORT_FILE), next(seen)
    if path.exists():
        head = read_report(path, model.config).to(device)
    else:
        head = ReportHead(model.config).to(device)
        levels = _seen(g_a, first.clean, first.rate)
        head.deviation.copy_(torch.stack([x.std((0, 2, 3)) for x in levels]).clamp_min(1e-4))
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    bar = tqdm(total=round(60 * minutes), unit="s", mininterval=5)
    lessons: deque[Lesson] = deque(maxlen=_KEPT)
    start, step, mean = time.monotonic(), 0, 0.0
    while (seconds := time.monotonic() - start) < 60 * minutes:
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 50, decay(seconds / (60 * minutes)))
        data = next(drawn if step % _DRAWN_EVERY == 0 else seen)
        features = [x.half() for x in _seen(g_a, data.degraded, data.rate)]
        lessons.append(Lesson(features, *(one.to(device) for one in targets(data.added_mse))))
        loss = learn(head, optimizer, lessons[-1])
        mean = 0.98 * mean + 0.02 * loss if step else loss
        for index in torch.randint(len(lessons), (_REPLAYS,)).tolist():
            learn(head, optimizer, lessons[index])
        step += 1
        bar.update(round(seconds) - bar.n)
        bar.set_description(f"step {step}  loss {mean:.4f}", refresh=False)
    bar.close()
    learned = {name: value.cpu().contiguous() for name, value in head.state_dict().items()}
    record = {"minutes": f"{minutes:g}", "steps": f"{step}", "lr": f"{lr:g}", "seed": f"{seed}"}
    save_file(learned, path, {_ENCODER: encoder, **{f"report_{name}": value for name, value in record.items()}})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.training.report", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt of a run")
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs, searched recursively")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=7, help="another one for going on with a head")
    parser.add_argument("--lr", type=float, default=3e-3, help="less for going on with a head that is good already")
    args = parser.parse_args()
    print(train_report(args.checkpoint, args.photos, args.minutes, args.seed, args.lr))


if __name__ == "__main__":
    main()
