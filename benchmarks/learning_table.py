"""Lay out what `benchmarks.learning` printed: a table over methods, and their frontiers.

python -m benchmarks.learning_table RESULTS.jsonl --output docs/learning
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rl4med_ddpo.foundation.files import write_whole

Result = dict[str, Any]
NEVER = "not reached"
BLOCK = r"(<!-- learning -->\n).*?(<!-- end -->)"


def table(results: Sequence[Result]) -> str:
    """Lay out each method's runs in Markdown: means over seeds, and the least and greatest."""
    heads = (
        "method", "class", "seeds", "images", "CPU s", "images to SD's best APR",
        "guidance", "APR %", "diversity, read right", "distance", "worst prompt %",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    base = {r["seed"]: best(r)["apr"] for r in results if r["method"] == "sd"}
    for method, runs in by_method(results).items():
        trained = method != "sd"
        cells = (
            f"`{method}`",
            runs[0]["label"] if trained else "no training",
            str(len(runs)),
            f"{runs[0]['images'][-1]:,}" if trained else "-",
            spread([run["cpu_s"][-1] for run in runs], 0) if trained else "-",
            reached(runs, base) if trained else "-",
        )
        for first, points in ((cells, [own(r) for r in runs]), ([""] * 6, [best(r) for r in runs])):
            lines.append(f"| {' | '.join([*first, *scores(points)])} |")
    return "\n".join(lines) + "\n"


def scores(points: Sequence[Result]) -> tuple[str, ...]:
    """Word the scores of the runs of a method, each at one guidance."""
    return (
        ", ".join(dict.fromkeys(f"{point['guidance']:g}" for point in points)),
        spread([100 * point["apr"] for point in points], 1),
        spread([point["diversity_right"] for point in points], 2),
        spread([point["distance"] for point in points], 3),
        spread([100 * point["worst_prompt"] for point in points], 0),
    )


def own(run: Result) -> Result:
    """Return the point at the guidance of training."""
    return next(p for p in run["frontier"] if p["guidance"] == run["guidance"])


def best(run: Result) -> Result:
    """Return the point at a run's best guidance, found on validation noise."""
    return next(p for p in run["frontier"] if p["guidance"] == run["best_guidance"])


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Sort runs by method, in the order in which methods first appear, and by seed."""
    found: dict[str, list[Result]] = defaultdict(list)
    for run in results:
        found[run["method"]].append(run)
    return {method: sorted(runs, key=lambda run: run["seed"]) for method, runs in found.items()}


def reached(runs: Sequence[Result], base: dict[int, float]) -> str:
    """Say after how many images each run stood, at its own guidance, at the APR of SD's best."""
    said = []
    for run in runs:
        goal = base.get(run["seed"])
        hits = [n for n, apr in zip(run["images"], run["apr"], strict=True) if goal and apr >= goal]
        said.append(f"{hits[0]:,}" if hits else NEVER)
    return ", ".join(said)


def spread(values: Sequence[float | None], digits: int) -> str:
    """Word the mean of some values, with the least and the greatest in round brackets."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{np.mean(known):,.{digits}f}"
    if len(known) == 1:
        return text
    return f"{text} ({min(known):,.{digits}f} to {max(known):,.{digits}f})"


def figure(results: Sequence[Result]) -> Figure:
    """Draw each method's first seed: APR by images, and over distance and diversity."""
    drawn = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    learning, distance, diversity = drawn.subplots(1, 3, sharey=True)
    for method, runs in by_method(results).items():
        run = runs[0]
        (line,) = learning.plot(
            run.get("images", []), [100 * apr for apr in run.get("apr", [])], "o-", markersize=3
        )
        for axis, score in ((distance, "distance"), (diversity, "diversity_right")):
            points = [p for p in run["frontier"] if p[score] is not None]
            x, y = [p[score] for p in points], [100 * p["apr"] for p in points]
            axis.plot(x, y, "o-", markersize=3, color=line.get_color(), label=method)
            for point, across, up in zip(points, x, y, strict=True):
                axis.annotate(
                    f"{point['guidance']:g}", (across, up), (3, 3), fontsize=6,
                    textcoords="offset points", color=line.get_color(),
                )  # fmt: skip
    learning.set_xlabel("images trained on, at the guidance of training")
    learning.set_ylabel("APR in %")
    distance.set_xlabel("kernel distance to real images, over guidance")
    diversity.set_xlabel("diversity among images read right, over guidance")
    diversity.legend(fontsize=8)
    for axis in (learning, distance, diversity):
        axis.grid(alpha=0.3)
    return drawn


def main() -> None:
    """Write `table.md`, `frontier.png` and the results themselves to a folder, and fill a page."""
    parser = argparse.ArgumentParser(description="Lay out what benchmarks.learning printed.")
    parser.add_argument("results", type=Path, nargs="+", help="files of one JSON object a line")
    parser.add_argument("--output", type=Path, default=Path("docs/learning"), help="folder")
    parser.add_argument("--page", type=Path, help="Markdown whose block `learning` gets the table")
    given = parser.parse_args()
    lines = [line for path in given.results for line in path.read_text().splitlines() if line]
    results = [json.loads(line) for line in lines]
    given.output.mkdir(parents=True, exist_ok=True)
    write_whole(given.output / "results.jsonl", "\n".join(lines) + "\n")
    write_whole(given.output / "table.md", table(results))
    figure(results).savefig(given.output / "frontier.png")
    if given.page:
        page = given.page.read_text()
        block = rf"\1{table(results)}\2"
        write_whole(given.page, re.sub(BLOCK, block, page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
