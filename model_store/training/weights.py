"""The weights of a run in a file small enough to keep in the repository, from which a later run can start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_store.training.growth import grown
from service.codec.config import CONFIGS, LAMBDA_RANGE, CodecConfig
from service.codec.prior import ORDINALS

FIRST_LAMBDA_RANGE = (80.0, 5000.0)
"""Of the runs that did not write theirs down."""

_LOW, _HIGH = "lambda_low", "lambda_high"


def keep_weights(checkpoint: Path, path: Path) -> None:
    """Write a checkpoint's EMA weights as float16 safetensors, without the optimizer: about 2 bytes per parameter.

    Raises:
        ValueError: a weight is beyond float16.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    mean: dict[str, Tensor] = state["ema"]
    as_float16 = {
        name: value.half().contiguous() if value.is_floating_point() else value for name, value in mean.items()
    }
    for name, value in as_float16.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"expected weights within float16, {name} reaches {float(mean[name].abs().max()):g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    low, high = trained_lambdas(state["record"])
    save_file(as_float16, path, {_LOW: str(low), _HIGH: str(high)})


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint whole, or leave the one that was there."""
    new = path.with_suffix(".new")
    torch.save(dict(state), new)
    new.replace(path)


def named(path: Path) -> str:
    """A checkpoint's path as records tell it: the run's folder and the file."""
    return f"{path.parent.name}/{path.name}"


def write_mixed(state: Mapping[str, Any], weights: Mapping[str, Tensor], output: Path, **told: str) -> None:
    """Write weights that come of several runs as a checkpoint without an optimizer, to be exported or started from.

    Args:
        state: checkpoint of a run, whose size, steps, time and record go along.
        weights: of its size, their rate points spaced over today's `LAMBDA_RANGE`.
        told: what the record says besides, of where they come from.
    """
    low, high = LAMBDA_RANGE
    record = {**state["record"], "lambda_low": low, "lambda_high": high, **told}
    output.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint({"size": state["size"], "model": weights, "ema": weights, "step": state["step"],
                     "seconds": state["seconds"], "record": record}, output)  # fmt: skip


def check_output(output: Path, *sources: Path) -> None:
    """Raises:
    ValueError: it is one of those that it is made from, and a run could not go on from that any more.
    """
    if output.resolve() in {source.resolve() for source in sources}:
        raise ValueError(f"expected another output than {output}, which it is made from")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a run as they are: a file of `keep_weights`, or the EMA of a checkpoint."""
    return _read(path)[0]


def weights_to_start_from(path: Path, config: CodecConfig) -> dict[str, Tensor]:
    """The weights of a run, its rate points moved to today's `LAMBDA_RANGE`, grown to `config`."""
    weights, trained = _read(path)
    return grown(stretched(weights, trained, LAMBDA_RANGE), config)


def _read(path: Path) -> tuple[dict[str, Tensor], tuple[float, float]]:
    if path.suffix != ".safetensors":
        state = torch.load(path, map_location="cpu", weights_only=True)
        return dict(state["ema"]), trained_lambdas(state["record"])
    with safe_open(path, framework="pt") as opened:
        trained = trained_lambdas(opened.metadata() or {})
    weights = load_file(path)
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}, trained


def trained_lambdas(record: Mapping[str, Any]) -> tuple[float, float]:
    """The range of lambda that a run's record, or a file's metadata, tells."""
    low, high = FIRST_LAMBDA_RANGE
    return float(record.get(_LOW, low)), float(record.get(_HIGH, high))


def config_of(size: str, weights: Mapping[str, Tensor]) -> CodecConfig:
    """Of weights that may be older than today's passes."""
    return replace(CONFIGS[size], passes=sum(f"prior.layers.{step}_hidden.weight" in weights for step in ORDINALS))


def stretched(
    weights: dict[str, Tensor], trained: tuple[float, float], wanted: tuple[float, float]
) -> dict[str, Tensor]:
    """The same model with its rate points log-spaced over another range of lambda.

    Whatever depends on the rate is a line between two anchors over log lambda; the anchors move along their line. At a
    lambda within both ranges the model is the same as before.
    """
    low, high = (math.log(value / trained[0]) / math.log(trained[1] / trained[0]) for value in wanted)
    out = dict(weights)
    for name, value in weights.items():
        if name.endswith("_low"):
            other = name.removesuffix("_low") + "_high"
            out[name], out[other] = value.lerp(weights[other], low), value.lerp(weights[other], high)
        elif name.startswith("z_prior."):
            out[name] = torch.stack([value[0].lerp(value[1], low), value[0].lerp(value[1], high)])
    return out
