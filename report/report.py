"""`rl4med-ddpo report RUN...`: the paper's tables and figures out of finished runs."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.files import write_whole
from rl4med_ddpo.foundation.hashes import sha256_of
from rl4med_ddpo.metrics.alignment import reader_of_all
from rl4med_ddpo.metrics.leak_matrix import leak_matrix
from rl4med_ddpo.report.changes import changes_paragraph
from rl4med_ddpo.report.figures import frontier_figure, leakage_figure
from rl4med_ddpo.report.pictures import few_real_figure, prompt_figure, same_seed_figure
from rl4med_ddpo.report.results import write_csv
from rl4med_ddpo.report.runs import Missing, Runs, find_runs
from rl4med_ddpo.report.tables import (
    BUILDERS,
    Table,
    augmentation_scores,
    require_frontiers,
    require_models,
)


def report(runs: list[Path], output: Path | None = None) -> Path:
    """Write the paper's Tables 1 to 4, ours next to the paper's, and Figures 1, 3 and 4.

    Each table as Markdown, CSV and LaTeX, each figure as PNG, everything on one page in
    `report.md`, and in TensorBoard. What has nothing to be made of says which command makes it.

    Args:
        runs: Run folders, or folders that hold some: those of SD, of SD+RL or SD+DRaFT, of Table 4.
        output: Folder to write; by default `report` in the first of them.
    """
    found = find_runs(runs)
    output = output or runs[0] / "report"
    page = ["# Report", "", _changes(found), ""]
    for name, build in BUILDERS.items():
        try:
            page += [*_write_table(build(found), output / name), ""]
        except Missing as why:
            page += [f"**{name.replace('_', ' ').capitalize()}** is missing, {why}", ""]
    if found.arms and len({len(seeds) for seeds in found.arms.values()}) == 1:
        write_csv(output / "table_4_numbers.csv", augmentation_scores(found), index=False)
    page += _write_figures(found, output)
    origins = {model: _beside(folder, output) for model, folder in found.folders.items()}
    page += ["Made of:", "", *(f"- {model}: {folder}" for model, folder in origins.items()), ""]
    write_whole(output / "report.md", "\n".join(page))
    _write_manifest(found, output)
    _log(output)
    return output / "report.md"


def _changes(runs: Runs) -> str:
    try:
        require_models(runs)
        return "\n\n".join(changes_paragraph(runs, model) for model in runs.trained)
    except Missing as why:
        return f"**What training changed** is missing, {why}"


def markdown(rows: pd.DataFrame) -> str:
    """Lay a table of text out as Markdown."""
    lines = [list(rows.columns), ["---"] * len(rows.columns), *rows.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def latex(table: Table) -> str:
    """Lay a table out for LaTeX, with booktabs."""
    rows = [" & ".join(map(_escaped, line)) + r" \\" for line in table.rows.to_numpy().tolist()]
    return "\n".join(
        [
            r"\begin{table}", r"\centering\small", rf"\caption{{{_escaped(table.title)}}}",
            rf"\begin{{tabular}}{{{'l' * table.rows.shape[1]}}}", r"\toprule",
            " & ".join(map(_escaped, table.rows.columns)) + r" \\", r"\midrule",
            *rows, r"\bottomrule", r"\end{tabular}",
            *(rf"\par\footnotesize {_escaped(note)}" for note in table.notes),
            r"\end{table}", "",
        ]
    )  # fmt: skip


def _escaped(text: object) -> str:
    escaped = str(text).replace("\\", r"\textbackslash ")
    for sign in "%&#_$":
        escaped = escaped.replace(sign, f"\\{sign}")
    return escaped.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ")


def _write_table(table: Table, path: Path) -> list[str]:
    table = table._replace(rows=table.rows.fillna("-").astype(str))
    body = [f"## {table.title}", "", markdown(table.rows), "", *(f"- {n}" for n in table.notes)]
    write_whole(path.with_suffix(".md"), "\n".join(body) + "\n")
    write_csv(path.with_suffix(".csv"), table.rows, index=False)
    write_whole(path.with_suffix(".tex"), latex(table))
    return body


def _write_figures(runs: Runs, output: Path) -> list[str]:
    """Draw what can be drawn; return the lines that show it, or say what is missing."""
    drawn = {
        "figure_1.png": ("Figure 1. The same noise, before and after training", same_seed_figure),
        "figure_3.png": ("Figure 3. Real images next to those of each model", prompt_figure),
        "figure_4.png": ("Figure 4. Prompts with fewer than 20 real images", few_real_figure),
        "frontier.png": ("What guidance gives, and what training adds", _frontier),
        "leakage.png": ("Which attribute leaks into which prompt, before and after", _matrices),
    }
    lines = []
    for name, (title, draw) in drawn.items():
        try:
            require_models(runs)
            draw(runs, output / name)
            lines += [f"## {title}", "", f"![{title}]({name})", ""]
        except Missing as why:
            lines += [f"**{title}** is missing, {why}", ""]
    return lines


def _matrices(runs: Runs, path: Path) -> None:
    vocabulary = runs.vocabulary
    matrices = {model: leak_matrix(runs.manifest(model), vocabulary) for model in runs.models}
    for model, matrix in matrices.items():
        write_csv(path.with_name(f"leakage_{model.replace('+', '_').lower()}.csv"), matrix)
    readers = {m: reader_of_all(runs.manifest(m), vocabulary) == "reward" for m in runs.models}
    leakage_figure(matrices, path, vocabulary, readers)


def _frontier(runs: Runs, path: Path) -> None:
    require_frontiers(runs)
    frontier_figure(runs.frontiers).savefig(path)


def _write_manifest(runs: Runs, output: Path) -> None:
    """Write the sha256 of what the report was made of and of the tables it came to."""
    hashes = {
        "made of": {_beside(path, output): sha256_of(path) for path in runs.files},
        "tables": {path.name: sha256_of(path) for path in sorted(output.glob("*.csv"))},
    }
    write_whole(output / "manifest.json", json.dumps(hashes, indent=2) + "\n")


def _beside(path: Path, output: Path) -> str:
    return os.path.relpath(path, output.resolve().parent)


def _log(output: Path) -> None:
    """Show tables and figures in TensorBoard, in place of those of an earlier report."""
    shutil.rmtree(output / "tensorboard", ignore_errors=True)
    logger = TensorBoardLogger(str(output), name="tensorboard", version="")
    for path in sorted(output.glob("*.md")):
        logger.experiment.add_text(f"report/{path.stem}", path.read_text())
    for path in sorted(output.glob("*.png")):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        logger.experiment.add_image(f"report/{path.stem}", pixels, dataformats="HWC")
    logger.finalize("success")


def report_parser(**options: Any) -> ArgumentParser:
    """Return the parser of `report`, which needs runs and no configuration."""
    parser = ArgumentParser(
        description="Write the paper's tables and figures of finished runs.", **options
    )
    parser.add_argument(
        "runs", nargs="+", help="run folders, or folders that hold some", metavar="RUN"
    )
    parser.add_argument("--output", type=Path | None, help="folder to write; default: RUN/report")
    return parser


def run_folders(given: Sequence[str]) -> list[Path]:
    """Turn arguments into folders.

    Raises:
        UserError: if none is given or one is no folder.
    """
    missing = [name for name in given if not os.path.isdir(name)]
    if missing or not given:
        raise UserError(
            f"report needs folders of finished runs; {', '.join(missing) or 'none given'}"
            f"{' is not one' if missing else ''}.\n  For example: rl4med-ddpo report runs"
        )
    return [Path(name) for name in given]
