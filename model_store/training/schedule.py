"""Learning rates over a budget of time."""

from __future__ import annotations

from dataclasses import dataclass

WARM_UP_STEPS, WARM_UP_SHARE = 200, 0.05
"""The learning rates rise for so many steps, in a short run for this share of its time."""


def decay(progress: float, steady: float = 0.0) -> float:
    """1 for a steady share of the time, then linearly down to 2%; `progress` from 0 to 1."""
    return min(1.0, max(0.02, (1 - progress) / max(1e-9, 1 - steady)))


@dataclass(frozen=True)
class Schedule:
    """Learning rates over a budget of time: a steady share of it, then a linear decay to 2%.

    `lr` is that of the transforms, `prior_lr` that of the entropy model.
    """

    minutes: float
    lr: float
    prior_lr: float
    steady: float

    def factor(self, seconds: float, step: int) -> float:
        """What the rates are multiplied by, after so many seconds and steps."""
        progress = seconds / (60 * self.minutes)
        warm = max((step + 1) / WARM_UP_STEPS, progress / WARM_UP_SHARE)
        return min(1.0, warm) * decay(progress, self.steady)
