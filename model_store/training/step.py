"""One step of training: loss, gradient, update, running mean (EMA), and figures of it for the log.

On a GPU the step is captured once and replayed (CUDA graphs): the thousands of small kernels of the entropy model would
otherwise wait for Python.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from model_store.training.loss import balanced_distortion
from service.codec.model import CodecOutput, CodedLatents, TrainableCodec
from service.codec.transforms import rate_lambda

STEADY_WEIGHT, STEADY_NOISE = 0.5, 0.05
"""z of the rounded latents, as a later generation sees them, shall be z of the latents: it decides their rounding.
The weight is that of the mean squared distance between the two; the noise, in steps, is what g_s and g_a may lose."""

EMA_DECAY = 0.999
"""Reached after 9,000 steps; before, the mean is over the last ninth of them or so (46 steps of 420)."""

FIGURES = (
    "loss", "bpp", "z_bpp", "unsteadiness", "grad_norm", "prior_grad_norm", "dropped", "psnr",
    "clean_bpp", "clean_psnr", "clean", "count",
)  # fmt: skip
"""Of a step, each a mean over its photos; `clean_...` times the share `clean` of those that are, `count` is one.
`grad_norm` is that of the transforms before it is clipped, `prior_grad_norm` that of the entropy model."""

_GRAPH_WARM_UP, _GRAPHS_AHEAD = 3, 2


class Ema:
    """A running mean of the parameters; it is what ships."""

    def __init__(self, model: nn.Module) -> None:
        self._live = model.state_dict()
        self.mean = {name: value.detach().clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_([self.mean[name] for name in self._live], list(self._live.values()), 1 - decay)


def costs(out: CodedLatents, clean: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each photo (B,): lambda D + bpp, or bpp alone where nothing was decoded; bits per pixel; PSNR in dB, or 0."""
    bpp = (out.y_bits + out.z_bits) / (clean.shape[2] * clean.shape[3])
    if not isinstance(out, CodecOutput):
        return bpp, bpp, torch.zeros_like(bpp)
    mse = (out.x_hat.float() - clean).square().mean((1, 2, 3))
    weight = rate_lambda(rate)
    psnr = -10 * mse.detach().clamp_min(1e-9).log10()
    return bpp + weight * balanced_distortion(mse, weight), bpp, psnr


def _unsteadiness(model: TrainableCodec, out: CodedLatents, rate: Tensor) -> Tensor:
    """The mean squared distance between z of y and z of y_hat, a little off. Only h_a learns from it, if it does."""
    if not any(parameter.requires_grad for parameter in model.h_a.parameters()):
        return out.y.new_zeros(())
    y_hat = out.y_hat.detach()
    with torch.no_grad():
        seen = [model.normalise(y, rate) for y in (out.y, y_hat + STEADY_NOISE * torch.randn_like(y_hat))]
    first, again = (model.h_a(y) for y in seen)
    return (first - again).square().mean()


def clipped(parameters: list[nn.Parameter], device: torch.device) -> Tensor:
    """The norm of a gradient before it is clipped to 1; zero where nothing has one."""
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    return clip_grad_norm_(learning, 1.0) if learning else torch.zeros((), device=device)


class Step:
    """Steps of one model, all on batches of one shape.

    Args:
        optimizer: with two groups, the transforms and the entropy model.
        train_transforms: whether g_a or g_s learns; else the entropy model learns alone, in a fraction of the time.
        bf16: bfloat16 autocast.

    Attributes:
        sums: (len(FIGURES),), of the steps since it was last zeroed.
    """

    def __init__(
        self, model: TrainableCodec, optimizer: torch.optim.Optimizer, train_transforms: bool, bf16: bool
    ) -> None:
        self.model, self.optimizer, self.train_transforms, self.bf16 = model, optimizer, train_transforms, bf16
        self.device = next(model.parameters()).device
        self.sums = torch.zeros(len(FIGURES), device=self.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._under_way: deque[torch.cuda.Event] = deque()
        self._rehearses = False

    def __call__(self, degraded: Tensor, clean: Tensor, rate: Tensor, clean_share: float) -> None:
        """Photos (B, 3, H, W), their originals, the rate index of each (B,), and the share of them that is clean."""
        if self.device.type != "cuda":
            self._run(degraded, clean, rate, torch.tensor(clean_share))
            return
        if not self._graph:
            self._inputs = degraded.clone(), clean.clone(), rate.clone(), torch.tensor(clean_share, device=self.device)
            self._graph = self._captured()
        for held, new in zip(self._inputs, (degraded, clean, rate)):
            held.copy_(new)
        self._inputs[3].fill_(clean_share)
        self._graph.replay()
        self._under_way.append(torch.cuda.Event())
        self._under_way[-1].record()
        if len(self._under_way) > _GRAPHS_AHEAD:
            self._under_way.popleft().synchronize()

    def _captured(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        self._rehearses = True
        with torch.cuda.stream(side):
            for _ in range(_GRAPH_WARM_UP):
                self._run(*self._inputs)
        self._rehearses = False
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.sums.zero_()
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self._run(*self._inputs)
        return graph

    def _run(self, degraded: Tensor, clean: Tensor, rate: Tensor, clean_share: Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            out = self.model(degraded, rate) if self.train_transforms else self.model.code(degraded, rate)
        cost, bpp, psnr = costs(out, clean, rate)
        z_bpp = out.z_bits.mean() / (clean.shape[2] * clean.shape[3])
        unsteadiness = _unsteadiness(self.model, out, rate)
        loss = cost.log().mean() + STEADY_WEIGHT * unsteadiness  # a percent less counts the same at every rate point
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # Each by itself: the transforms' norm, which differs tenfold by kind, would decide how much the prior learns.
        norm, prior_norm = (clipped(group["params"], self.device) for group in self.optimizer.param_groups)
        finite = norm.isfinite() & prior_norm.isfinite()
        dropped = torch.ones_like(norm) if self._rehearses else (~finite).float()
        self.optimizer.found_inf = dropped  # type: ignore[attr-defined]  # as a GradScaler does: no update then
        self.optimizer.step()
        with torch.no_grad():
            mean_bpp, mean_psnr = bpp.mean(), psnr.mean()
            figures = (
                loss, mean_bpp, z_bpp, unsteadiness, norm, prior_norm, dropped, mean_psnr,
                mean_bpp * clean_share, mean_psnr * clean_share, clean_share, torch.ones_like(dropped),
            )  # fmt: skip
            seen = torch.stack(figures)
            self.sums += torch.where(seen.isfinite(), seen, 0)
