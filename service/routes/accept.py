"""The choice of an answer's format from the `Accept` header."""

from __future__ import annotations

from service.errors import MALFORMED, NOT_ACCEPTABLE, Problem
from service.imaging import OutputFormat


def choose_format(accept: str, side: int = 1) -> OutputFormat:
    """The best format for an `Accept` header (RFC 9110, section 12.5.1); ties go to the order of `OutputFormat`.

    `side` is the longer side of the photo in pixels: a format that cannot hold it is not offered.

    Raises:
        Problem: 406, none of ours is acceptable.
    """
    if not accept.strip():
        return OutputFormat.PNG
    ranges: dict[str, float] = {}
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        try:
            ranges[name] = min(1.0, max(0.0, float(weight)))
        except ValueError:
            raise Problem(MALFORMED, f"Accept: expected a weight from 0 to 1, got {weight!r}") from None

    def quality(output: OutputFormat) -> float:
        if side > output.longest:
            return 0.0
        for name in (output.media_type, "image/*", "*/*"):
            if name in ranges:
                return ranges[name]
        return 0.0

    best = max(OutputFormat, key=quality)
    if quality(best) <= 0:
        offered = ", ".join(output.media_type for output in OutputFormat if side <= output.longest)
        large = f" for a side of {side} pixels" if side > 1 else ""
        raise Problem(NOT_ACCEPTABLE, f"Accept: expected one of {offered}{large}, got {accept!r}")
    return best
