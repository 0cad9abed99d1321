"""`python -m tests.bench.effort`: the time and memory that refinement takes, by model, effort and size of a photo.

Each photo has a process of its own; the report calls it clean, so it is refined. Prints a table and writes JSON. A
benchmark, not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json

from tests.bench.machine import machine, result_file
from tests.bench.speed import large

WANTED = (
    *(("edge-9", (512, 768), effort) for effort in (0, 1, 4, 8)),
    *(("base-3", (512, 768), effort) for effort in (0, 1, 4, 8)),
    *(("edge-9", (1500, 2000), effort) for effort in (0, 1, 4)),
    *(("edge-9", (3000, 4000), effort) for effort in (0, 1)),
)
"""Model, height and width, effort."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.effort", description=__doc__)
    parser.parse_args()
    rows = []
    for model, (height, width), effort in WANTED:
        found = large(height, width, model, effort)
        rows.append({"model": model, "effort": effort, **found})
        print(f"{model:8} {width}x{height} effort {effort}: {found['compress_s']:6.1f} s, {found['bytes']} bytes, "
              f"at most {found['compress_mib']:.0f} MiB ({found['idle_mib']:.0f} before)", flush=True)  # fmt: skip
    report = {"rate": 4, "machine": machine(), "rows": rows}
    result_file("effort").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
