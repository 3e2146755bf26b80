"""The README's numbers come from finished demos: `python -m rl4med_ddpo.report.readme RUN...`.

The report of the first run and the scores of all go into `docs/report`, each table as CSV under its
hash in `manifest.json`, and from there into the README: a block between `<!-- docs/report/NAME.md
-->` and `<!-- end -->` is that file without its heading. Tests hold the chain equal, link by link.
"""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl4med_ddpo.foundation.files import write_whole
from rl4med_ddpo.foundation.hashes import sha256_of
from rl4med_ddpo.report.cells import percent

ROOT = Path(__file__).parents[1]
FOLDER = Path("docs/report")
BLOCK = re.compile(rf"(<!-- ({FOLDER}/\w+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)
SCORES = ("apr", "apr_interval", "n", "reward")


def rendered(readme: str, root: Path = ROOT) -> str:
    """Return a README with each block as its file in `root` says."""

    def block(found: re.Match[str]) -> str:
        _, _, body = (root / found[2]).read_text().partition("\n\n")
        return found[1] + body + found[3]

    return BLOCK.sub(block, readme)


def taken(runs: Sequence[Path], root: Path = ROOT) -> None:
    """Take the report of the first finished demo, and the scores of all, into `docs/report`."""
    folder = root / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    page_alone = shutil.ignore_patterns("report.md", "*.tex", "tensorboard")
    shutil.copytree(runs[0] / "report", folder, ignore=page_alone)
    demos = [demo_scores(run / "results.json") for run in runs]
    write_whole(folder / "demo.json", json.dumps(demos, indent=2) + "\n")
    write_whole(folder / "demo.md", demo_table(demos))


def demo_scores(path: Path) -> dict[str, Any]:
    """Return what the README says of a demo, from its `results.json`."""
    results = json.loads(path.read_text())
    scores = {model: {k: results[model][k] for k in SCORES} for model in ("sd", "sd_rl")}
    return {
        "seed": results["sd"]["provenance"]["sampler"]["seed"],
        **scores,
        "ceiling": results["ceiling"],
        "results.json": sha256_of(path),
    }


def demo_table(demos: Sequence[dict[str, Any]]) -> str:
    """Lay out the scores of several demos in Markdown."""
    heads = ("command", *(f"APR of {what}, %" for what in ("SD", "SD+RL", "real images")),
             "of the gap", "reward")  # fmt: skip
    lines = ["## APR of SD and SD+RL", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for demo in demos:
        before, after, most = (demo[k]["apr"] for k in ("sd", "sd_rl", "ceiling"))
        cells = (
            f"`make demo{_options(demo['seed'])}`",
            *(percent(demo[model]) for model in ("sd", "sd_rl")),
            f"{100 * most:.1f}",
            f"{(after - before) / (most - before):.0%}",
            f"{demo['sd']['reward']:.3f} to {demo['sd_rl']['reward']:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _options(seed: int) -> str:
    return f" SEED={seed} RUN=runs/demo{seed}" if seed else ""


if __name__ == "__main__":
    if sys.argv[1:]:
        taken([Path(run) for run in sys.argv[1:]])
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))
