"""Tables and plots from the JSON of `model_store/evaluation/results`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model_store.evaluation.conditions import PUBLISHED
from model_store.evaluation.rate_distortion import BUDGET, Record, bd_rate, curves, input_psnr

COLOURS = {
    "LIMPID": "#0b6e99",
    "JPEG": "#9aa0a6",
    "WEBP": "#c58b2b",
    "AVIF": "#7a5195",
    "NLM+WEBP": "#e5c494",
    "NLM+AVIF": "#bc9bd3",
}


def table(records: Sequence[Record]) -> str:
    """A Markdown table: the best PSNR within `BUDGET` per set, condition and codec, and BD-rate against each peer."""
    all_curves = curves(records)
    codecs = sorted({codec for *_, codec in all_curves}, key=list(COLOURS).index)
    peers = [codec for codec in codecs if codec != "LIMPID"]
    head = [
        "set",
        "condition",
        "input dB",
        *(f"{c} dB within {BUDGET}" for c in codecs),
        *(f"BD-rate vs {p}" for p in peers),
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, condition in dict.fromkeys((s, c) for s, c, _ in all_curves):
        cells = [name, condition, "" if condition == "clean" else f"{input_psnr(records, name, condition):.2f}"]
        for codec in codecs:
            curve = all_curves.get((name, condition, codec))
            value = curve.psnr_within(BUDGET) if curve else None
            cells.append("-" if value is None else f"{value:.2f}")
        for peer in peers:
            ours, theirs = all_curves.get((name, condition, "LIMPID")), all_curves.get((name, condition, peer))
            change = bd_rate(ours, theirs) if ours and theirs else None
            cells.append("-" if change is None else f"{change:+.0f}%")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def published_table(records: Sequence[Record]) -> str:
    """A Markdown table: the model on Kodak with sensor noise at the rates that Cheng et al. report."""
    lines = ["| condition | bpp | Cheng et al. dB | LIMPID within it, dB | difference |", "|---|---|---|---|---|"]
    all_curves = curves(records)
    for condition, points in PUBLISHED.items():
        curve = all_curves.get(("kodak", condition, "LIMPID"))
        for bpp, theirs in points:
            ours = curve.psnr_within(bpp) if curve else None
            told = ("-", "-") if ours is None else (f"{ours:.2f}", f"{ours - theirs:+.2f}")
            lines.append(f"| {condition} | {bpp} | {theirs:.2f} | {told[0]} | {told[1]} |")
    return "\n".join(lines)


def effort_table(records: Sequence[Record]) -> str:
    """A Markdown table of what `evaluation effort` measured: per condition and effort the best PSNR within `BUDGET`,
    and the bits at equal PSNR against an effort of 0."""
    lines = [f"| condition | rate points | effort | dB within {BUDGET} bpp | bits |", "|---|---|---|---|---|"]
    all_curves = curves(records)
    for (name, condition, codec), curve in all_curves.items():
        change = bd_rate(curve, all_curves[name, condition, "effort-0"])
        within, told = curve.psnr_within(BUDGET), "-" if change is None else f"{change:+.1f}%"
        rates = f"{min(curve.setting)} to {max(curve.setting)}"
        lines.append(f"| {condition} | {rates} | {codec[7:]} | {'-' if within is None else f'{within:.3f}'} | {told} |")
    return "\n".join(lines)


def plot(records: Sequence[Record], model: str, folder: Path) -> list[Path]:
    """`MODEL-SET.png` per set with a panel per condition: PSNR over bpp for every codec, and the upload's own PSNR.

    Args:
        records: of `model` (codec `LIMPID`) and its peers.
    """
    from matplotlib.figure import Figure

    all_curves, paths = curves(records), []
    for name in dict.fromkeys(s for s, *_ in all_curves):
        conditions = list(dict.fromkeys(c for s, c, _ in all_curves if s == name))
        columns = min(4, len(conditions))
        rows = -(-len(conditions) // columns)
        figure = Figure((4.2 * columns, 3.6 * rows + 0.4), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        lines = {}
        for axis, condition in zip(axes.flat, conditions):
            for (s, c, codec), curve in all_curves.items():
                if (s, c) == (name, condition):
                    label = model if codec == "LIMPID" else codec
                    (lines[label],) = axis.plot(curve.bpp, curve.psnr, "o-", ms=3, color=COLOURS[codec])
            if condition != "clean":
                own = input_psnr(records, name, condition)
                lines["upload"] = axis.axhline(own, color="#c0392b", lw=0.8, ls=":")
            axis.set(
                title=f"{name}, {condition}", xlabel="bits per pixel", ylabel="PSNR against clean, dB", xlim=(0, 1.5)
            )
            axis.grid(alpha=0.3)
        for axis in axes.flat[len(conditions) :]:
            axis.remove()
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines))
        paths.append(folder / f"{model}-{name}.png")
        figure.savefig(paths[-1], dpi=80)
    return paths
