"""The sizes of the codec. A size is a value of `CodecConfig`, never a fork of the code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STRIDE = 16
"""Pixels per latent position, in each direction: every photo is padded to a multiple of it."""

RATE_POINTS = 8
"""Rate points of every model, numbered 1 (smallest) to 8 (best) in public and 0 to 7 as indexes inside the codec."""

LAMBDA_RANGE = (40.0, 8000.0)
"""Bits per pixel that one unit of MSE (pixels in [0, 1]) is worth, at the smallest and the best rate point."""

MOST_EFFORT = 8
"""Rounds of refinement; what further ones would save is next to nothing."""

MODEL_NAME = r"[a-z0-9][a-z0-9.-]*"
"""What a model may be called, a regular expression: it is part of file names, headers and labels."""


@dataclass(frozen=True)
class Stage:
    """`blocks` HATBs at `dim` channels; each stage after the first halves the resolution."""

    dim: int
    blocks: int


@dataclass(frozen=True)
class CodecConfig:
    """The shape of one model.

    Attributes:
        name: the size's name, also written to the store.
        stem: resolution step of the first layer: a pixel-unshuffle by this factor and a 1x1 convolution; for 1 a 3x3
            convolution, and then the steps between stages are 3x3 convolutions with a pixel (un)shuffle behind them.
        stages: resolution stages of g_a, finest first; g_s mirrors them. The last one's width is the number of latents.
        group: channels per attention group of C-GA, or
        heads: the number of its groups at every stage.
        ffn: hidden width of the gated FFN as a multiple of the stage's width.
        hyper: channels of z.
        features: channels of the hyper features that all passes of the prior see.
        context: hidden channels of the passes.
        passes: 2 or 4, of the prior. The first models have 2.
        skipped: latents up to this scale level are never coded and always equal to their mean: the few bits that they
            would get buy less than elsewhere, but on dim and dull photos. With level 2, 4, 6 (deviations of 0.14, 0.18,
            0.23) and counted frequencies four photos of Kodak took 0.5, 0.7, 0.8% fewer bits; under haze 0.3% fewer,
            as many, 4.0% more; in low light 0.4, 2.9, 5.2% more. The first models skip level 0 only.
    """

    name: str
    stem: int
    stages: tuple[Stage, ...]
    group: int = 32
    heads: int | None = None
    ffn: float = 2.0
    hyper: int = 64
    features: int = 128
    context: int = 256
    passes: int = 2
    skipped: int = 0

    def __post_init__(self) -> None:
        stride = self.stem * 2 ** (len(self.stages) - 1)
        if stride != STRIDE:
            raise ValueError(f"{self.name}: stem and stages must step down by {STRIDE} in all, not by {stride}")
        if self.passes not in (2, 4) or self.latents % self.passes:
            raise ValueError(f"{self.name}: expected 2 or 4 passes that divide the {self.latents} latents evenly")
        for stage in self.stages:
            if stage.dim % self.heads_of(stage.dim):
                raise ValueError(f"{self.name}: width {stage.dim} does not divide into equal groups")

    def heads_of(self, dim: int) -> int:
        """Attention groups of a stage of width `dim`."""
        return self.heads or -(-dim // self.group)

    @classmethod
    def from_dict(cls, stated: Mapping[str, Any]) -> CodecConfig:
        """What `dataclasses.asdict` gave, as models carry it.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(**{**stated, "stages": tuple(Stage(**stage) for stage in stated["stages"])})

    @property
    def watched(self) -> int:
        """Index of the stage that the degradation report reads: the last but one, at 1/8, or else the only one."""
        return max(0, len(self.stages) - 2)

    @property
    def latents(self) -> int:
        """Channels of y."""
        return self.stages[-1].dim


EDGE = CodecConfig("edge", stem=8, stages=(Stage(128, 3), Stage(192, 2)), passes=4, skipped=3)
BASE = CodecConfig(  # `edge` with more blocks and a finer stage, so that it can start from what `edge` has learned
    "base", stem=4, stages=(Stage(64, 2), Stage(128, 8), Stage(192, 6)), passes=4, skipped=3
)
PAPER_S = CodecConfig(
    "paper-s",
    stem=1,
    stages=(Stage(32, 2), Stage(64, 3), Stage(128, 3), Stage(256, 4), Stage(256, 0)),
    heads=4,
    ffn=2.66,
    hyper=128,
    skipped=3,
)
PAPER_L = CodecConfig(
    "paper-l",
    stem=1,
    stages=(Stage(48, 2), Stage(96, 3), Stage(192, 3), Stage(384, 4), Stage(288, 0)),
    heads=4,
    ffn=2.66,
    hyper=192,
    skipped=3,
)

CONFIGS = {config.name: config for config in (EDGE, BASE, PAPER_S, PAPER_L)}
