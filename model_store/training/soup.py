"""`python -m model_store.training.soup`: a mean of runs whose shares are learned, block by block.

A mean of runs that start from one another is often better than each, but its shares are found by trying and the same
for every layer. Here the weights are start + sum of share * (other - start) with a share per block and run, and these
shares are all that learns (after the learned soups of Wortsman et al., "Model soups", ICML 2022): some hundred numbers,
so that half an hour on a CPU is long, and what makes a short stage forget, noise in millions of weights, is left out.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model_store.training.batches import Batches
from model_store.training.compiled import compile_blocks
from model_store.training.photos import PhotoPool, check_crop
from model_store.training.schedule import decay
from model_store.training.step import costs
from model_store.training.weights import check_output, named, weights_to_start_from, write_mixed
from service.codec.config import CONFIGS
from service.codec.device import pick_device, transform_precision
from service.codec.model import TrainableCodec

BATCHES = 8
"""Per step of the shares: a batch holds one kind of damage, and a step shall see several."""

CLIP = 0.5
"""Of the gradient of the shares, batch by batch: single hazy photos have a hundred times the usual one."""

STEADY = 0.3
"""Share of the time before the learning rate decays."""

_BLOCK = re.compile(r"g_[as]\.stacks\.\d+\.blocks\.\d+|prior\.layers\.[a-z]+|\w+\.\w+")


class Soup:
    """Start and others in one model, whose weights follow the shares.

    Args:
        model: takes their weights.
        start, others: weights of its shape.

    Attributes:
        blocks: names of what has shares of its own.
        shares: (others, blocks), zeros at first, which is the start.
    """

    def __init__(
        self, model: TrainableCodec, start: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]
    ) -> None:
        model.load_state_dict(dict(start))
        self._parameters = dict(model.named_parameters())
        self._start = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._steps = [
            {name: one[name].to(value.device) - value for name, value in self._start.items()} for one in others
        ]
        self._block = {name: match[0] for name in self._parameters if (match := _BLOCK.match(name))}
        self.blocks = sorted(set(self._block.values()))
        self.shares = torch.zeros(len(others), len(self.blocks), requires_grad=True)

    @torch.no_grad()
    def apply(self, shares: Tensor) -> None:
        """Give the model the weights of these shares."""
        column = {block: shares[:, index].tolist() for index, block in enumerate(self.blocks)}
        for name, parameter in self._parameters.items():
            parameter.copy_(self._start[name])
            for share, step in zip(column[self._block[name]], self._steps):
                parameter.add_(step[name], alpha=share)

    @torch.no_grad()
    def accumulate_grad(self) -> None:
        """Add the gradient of the model's weights, clipped as a gradient of the shares, to that of the shares."""
        grads = {name: one.grad for name, one in self._parameters.items() if one.grad is not None}
        place = torch.tensor([self.blocks.index(self._block[name]) for name in grads])
        slopes = [torch.stack([(grad * step[name]).sum() for name, grad in grads.items()]) for step in self._steps]
        gradient = torch.zeros_like(self.shares).index_add_(1, place, torch.stack(slopes).cpu())
        norm = float(gradient.norm())
        if norm < float("inf"):  # a batch without a gradient does not count
            gradient *= min(1.0, CLIP / max(norm, 1e-12))
            self.shares.grad = gradient if self.shares.grad is None else self.shares.grad + gradient


def soup(
    start: Path,
    others: Sequence[Path],
    photos: Path,
    output: Path,
    *,
    minutes: float,
    lr: float = 0.01,
    batch: int = 4,
    crop: int = 224,
    seed: int = 1,
    device: str | None = None,
    compiled: bool = True,
) -> dict[str, list[float]]:
    """Learn the shares and write `output`, a checkpoint without an optimizer, as `average` does.

    Args:
        start: checkpoint.pt of a run, whose record goes along.
        others: weights of runs of its size.

    Returns:
        The shares of the others per block.

    Raises:
        ValueError: no usable photos, a crop that is no multiple of 16, too little time for one step, or an output that
            is what it is made from.
    """
    check_crop(crop)
    check_output(output, start, *others)
    where = pick_device(device or "auto")
    bf16 = transform_precision(where) == "bfloat16"
    torch.manual_seed(seed)
    state = torch.load(start, map_location="cpu", weights_only=True)
    config = CONFIGS[state["size"]]
    model = TrainableCodec(config).to(where).train()
    model.to(memory_format=torch.channels_last)
    mixed = Soup(model, weights_to_start_from(start, config), [weights_to_start_from(path, config) for path in others])
    if compiled and bf16:
        compile_blocks(model)
    optimizer = torch.optim.Adam([mixed.shares], betas=(0.9, 0.98))
    mean = mixed.shares.detach().clone()
    batches = Batches(PhotoPool(photos, crop, where), batch, crop, where, seed, one_kind=True)
    bar = tqdm(total=round(60 * minutes), unit="s", mininterval=1)
    began, steps = time.monotonic(), 0
    for count, data in enumerate(batches, 1):
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            out = model(data.degraded, data.rate)
        model.zero_grad(set_to_none=True)
        loss = costs(out, data.clean, data.rate)[0].log().mean()
        loss.backward()
        mixed.accumulate_grad()
        progress = (time.monotonic() - began) / (60 * minutes)
        if count % BATCHES == 0:
            for group in optimizer.param_groups:
                group["lr"] = lr * decay(progress, STEADY)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            mean.lerp_(mixed.shares.detach(), 1 - min(0.97, steps / (steps + 9)))
            mixed.apply(mixed.shares)
        bar.update(min(round(60 * minutes), round(60 * minutes * progress)) - bar.n)
        if progress >= 1:
            break
    bar.close()
    if not steps:
        raise ValueError(f"expected time for {BATCHES} batches at least, {minutes:g} minutes were enough for {count}")
    mixed.apply(mean)
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    told = ", ".join(f"{share:.3f} {named(path)}" for share, path in zip(mean.mean(1).tolist(), others))
    learned = {"soup": told, "soup_minutes": f"{minutes:g}", "soup_lr": f"{lr:g}", "soup_seed": f"{seed}"}
    write_mixed(state, weights, output, **learned)
    return dict(zip(mixed.blocks, mean.T.tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.training.soup", description=__doc__)
    parser.add_argument("start", type=Path, help="checkpoint.pt of the run to start from, such as a mean of the others")
    parser.add_argument("others", type=Path, nargs="+", help="weights of other runs")
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs, searched recursively")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint.pt to write, in a folder of its own")
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of the shares")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    shares = soup(args.start, args.others, args.photos, args.output, minutes=args.minutes, lr=args.lr, seed=args.seed)
    for block, values in shares.items():
        print(f"{block:28} {' '.join(f'{value:+.2f}' for value in values)}")


if __name__ == "__main__":
    main()
