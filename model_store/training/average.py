"""`python -m model_store.training.average`: a weighted mean of the weights of several runs, as a checkpoint to export.

Stages of training that start from one another lie in one basin, and their mean is often better than each (Wortsman et
al., "Model soups", ICML 2022). All are moved to today's range of lambda and passes of the prior first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model_store.training.growth import grown
from model_store.training.weights import check_output, named, weights_to_start_from, write_mixed
from service.codec.config import CONFIGS


def average(checkpoint: Path, parts: Sequence[tuple[float, Path]], output: Path) -> Path:
    """Write `output`: the checkpoint with the mean of `parts` for its weights and its EMA, without its optimizer.

    It is to be exported or started from; there is no run in it that could go on.

    Args:
        parts: shares, which sum to 1, and files of weights: checkpoints, or safetensors of `keep_weights`.

    Raises:
        ValueError: the shares do not sum to 1, the weights are of different models, or `output` is one of them.
    """
    check_output(output, checkpoint, *(path for _, path in parts))
    if abs(sum(share for share, _ in parts) - 1) > 1e-6:
        raise ValueError(f"expected shares that sum to 1, got {[share for share, _ in parts]}")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    config, mean = CONFIGS[state["size"]], dict[str, Tensor]()
    wanted = grown(state["ema"], config)
    for share, path in parts:
        weights = weights_to_start_from(path, config)
        if weights.keys() != wanted.keys():
            raise ValueError(f"expected the weights of one {state['size']}, {path} has others")
        for name, value in weights.items():
            mean[name] = mean.get(name, 0) + share * value if value.is_floating_point() else value
    told = ", ".join(f"{share:g} {named(path)}" for share, path in parts)
    write_mixed(state, mean, output, averaged=told)
    return output


def _part(text: str) -> tuple[float, Path]:
    share, _, path = text.partition("=")
    return float(share), Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.training.average", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt of the last run, whose record goes along")
    parser.add_argument("parts", type=_part, nargs="+", metavar="SHARE=FILE", help="0.5=runs/a/checkpoint.pt, ...")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint.pt to write, in a folder of its own")
    args = parser.parse_args()
    print(average(args.checkpoint, args.parts, args.output))


if __name__ == "__main__":
    main()
