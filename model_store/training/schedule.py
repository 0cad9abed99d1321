"""Learning rates over a budget of time."""

from __future__ import annotations

from dataclasses import dataclass

WARM_UP_STEPS = 200


def decay(progress: float, steady: float = 0.0) -> float:
    """1 for a steady share of the time, then linearly down to 2%; `progress` from 0 to 1."""
    return min(1.0, max(0.02, (1 - progress) / max(1e-9, 1 - steady)))


@dataclass(frozen=True)
class Schedule:
    """Learning rates over a budget of time: a steady share of it, then a linear decay to 2%.

    `lr` is that of the transforms, `prior_lr` that of the entropy model; the first `WARM_UP_STEPS` steps rise to them.
    """

    minutes: float
    lr: float
    prior_lr: float
    steady: float

    def factor(self, seconds: float, step: int) -> float:
        """What the rates are multiplied by, after so many seconds and steps."""
        return min(1.0, (step + 1) / WARM_UP_STEPS) * decay(seconds / (60 * self.minutes), self.steady)
