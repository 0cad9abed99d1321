"""`python -m model_store.training`: train or resume one model.

The first call starts a run in its folder, a later one with the same folder goes on where it stopped. The same command
serves CPU and GPU. `python -m model_store.training.export` puts the result into the store.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from model_store.training.loop import train
from model_store.training.schedule import Schedule
from service.codec.config import CONFIGS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.training", description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs, searched recursively")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run: checkpoint and log")
    parser.add_argument("--size", choices=sorted(CONFIGS), default="edge")
    parser.add_argument("--minutes", type=float, default=120, help="training time in all, over every resumption")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=160, help="side of the crops in pixels, a multiple of 16")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of the transforms")
    parser.add_argument("--prior-lr", type=float, default=1e-3, help="learning rate of the entropy model")
    parser.add_argument("--steady", type=float, default=0.5, help="share of the time before the learning rate decays")
    parser.add_argument("--seed", type=int, help="default: another one for every run, which its record tells")
    parser.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--start-from", type=Path, help="weights to start with: a checkpoint.pt, or a file of states/")
    parser.add_argument("--only", default="", metavar="REGEX", help="names of the parameters that learn; others stay")
    args = parser.parse_args()
    try:
        train(
            photos=args.photos,
            run=args.run,
            size=args.size,
            schedule=Schedule(args.minutes, args.lr, args.prior_lr, args.steady),
            batch=args.batch,
            crop=args.crop,
            seed=args.seed,
            device=args.device,
            compiled=not args.no_compile,
            start_from=args.start_from,
            only=args.only,
        )
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
