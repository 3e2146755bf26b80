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
from rl4med_ddpo.report.cells import percent, value_cell

ROOT = Path(__file__).parents[1]
FOLDER = Path("docs/report")
BLOCK = re.compile(rf"(<!-- ({FOLDER}/\w+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)
SCORES = (
    *("model", "guidance", "apr", "apr_interval", "n", "reward"),
    *("diversity_right", "distance"),
)


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
    return {
        "seed": results["sd"]["provenance"]["sampler"]["seed"],
        "rows": [_scores(row) for row in results["rows"]],
        "real": results["real"],
        "results.json": sha256_of(path),
    }


def _scores(row: dict[str, Any]) -> dict[str, Any]:
    worst = min(row["prompts"].items(), key=lambda prompt: prompt[1])
    return {**{name: row[name] for name in SCORES}, "worst": list(worst)}


def demo_table(demos: Sequence[dict[str, Any]]) -> str:
    """Lay out the scores of several demos in Markdown."""
    heads = ("command", "model", "guidance", "APR %", "diversity, read right", "distance",
             "worst prompt")  # fmt: skip
    lines = ["## APR of SD and of what was trained from it", "", f"| {' | '.join(heads)} |"]
    lines.append("| --- " * len(heads) + "|")
    for demo in demos:
        command = f"`make demo{_options(demo['seed'])}`"
        for row in demo["rows"]:
            name, worst = row["worst"]
            cells = (
                command,
                row["model"],
                f"{row['guidance']:g}",
                percent(row),
                f"{row['diversity_right']['value']:.2f}",
                value_cell(row["distance"], 3),
                f"{name} {100 * worst:.0f} %",
            )
            lines.append(f"| {' | '.join(cells)} |")
            command = ""
        real = demo["real"]
        diverse = f"{real['diversity_right']['value']:.2f}"
        lines.append(f"|  | real images | - | {percent(real)} | {diverse} | - | - |")
    return "\n".join(lines) + "\n"


def _options(seed: int) -> str:
    return f" SEED={seed} RUN=runs/demo{seed}" if seed else ""


if __name__ == "__main__":
    if sys.argv[1:]:
        taken([Path(run) for run in sys.argv[1:]])
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))
