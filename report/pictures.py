"""The paper's Figures 1, 3 and 4: samples side by side, the first of each prompt and no choice."""

from pathlib import Path

import pandas as pd
from PIL import Image

from rl4med_ddpo.datamodules.image_files import ImageFiles
from rl4med_ddpo.datamodules.images import INPUT
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.metrics.alignment import exact, judged, prompt_numbers, table_2_conditions
from rl4med_ddpo.report.runs import Missing, Runs
from rl4med_ddpo.report.sheet import Panel, save_png, sheet
from rl4med_ddpo.report.tables import counts_of

IMAGES_PER_PROMPT = 5
FEW_REAL = 20
MOST_ROWS = 12


def same_seed_figure(runs: Runs, path: Path, per_prompt: int = IMAGES_PER_PROMPT) -> None:
    """Draw Figure 1: the same prompt and noise, SD next to what was trained from it.

    Args:
        runs: Of SD and others.
        path: Of the PNG to write.
        per_prompt: Images of each of four prompts.
    """
    numbers = _numbers(runs, ("MEL+hair", "NV+hair", "MEL+ink", "NV+ruler"))
    title = "Same prompt, same noise, the first samples; framed: not as asked, by the judge"
    _side_by_side(runs, numbers, path, title, per_prompt)


def few_real_figure(runs: Runs, path: Path) -> None:
    """Draw Figure 4: prompts that fewer than 20 training images answer."""
    train = counts_of(runs)["subgroups"]["train"]
    rare = [i for i, n in enumerate(train) if n < FEW_REAL]
    if not rare:
        raise Missing(f"for there are {FEW_REAL} training images of every prompt")
    title = f"{len(rare)} prompts with fewer than {FEW_REAL} real training images"
    if len(rare) > MOST_ROWS:
        rare = rare[:: -(-len(rare) // MOST_ROWS)]
        title += f", {len(rare)} of them shown"
    remarks = [f"{train[i]} real training images" for i in rare]
    _side_by_side(runs, rare, path, title, IMAGES_PER_PROMPT, remarks)


def prompt_figure(runs: Runs, path: Path) -> None:
    """Draw Figure 3: real test images of a prompt beside those of the models."""
    data = _real_data(runs)
    numbers = _numbers(runs, ("NV+gel_bubble", "MEL+hair", "MEL+ruler", "NV+ink"))
    samples = {model: _Samples(runs, model) for model in runs.models}
    size = samples["SD"].files.size
    test = data.splits.test.sort_values("id", ignore_index=True)
    real = ImageFiles(data.paths(test), size, data.resize)
    of_prompt = prompt_numbers(test, runs.vocabulary)
    cells = [
        [
            Panel([real[row] for row in (of_prompt == number).nonzero()[0][:IMAGES_PER_PROMPT]]),
            *(some.first(number, IMAGES_PER_PROMPT) for some in samples.values()),
        ]
        for number in numbers
    ]
    labels = [_title(runs, number) for number in numbers]
    headings = ("Real (test split)", *runs.models)
    title = "The first images of a prompt; framed: not as asked, by the judge"
    save_png(sheet(cells, labels, headings, title), path)


class _Samples:
    """A model's samples by prompt."""

    def __init__(self, runs: Runs, model: str) -> None:
        self.manifest = runs.manifest(model)
        folder = runs.samples_folder(model) / INPUT
        paths = [folder / f"{name}.png" for name in self.manifest["id"]]
        if not paths[0].exists():
            raise Missing(
                f"from the images in {folder}, which are gone. Draw them: rl4med-ddpo predict"
            )
        with Image.open(paths[0]) as image:
            self.files = ImageFiles(paths, image.width)
        self.prompts = prompt_numbers(self.manifest, runs.vocabulary)
        self.hits = exact(self.manifest, judged(self.manifest, runs.vocabulary), runs.vocabulary)

    def rows(self, number: int) -> list[int]:
        """Return the rows of a prompt, by sample index."""
        rows = pd.Series((self.prompts == number).nonzero()[0])
        return rows.iloc[self.manifest["index"][rows].argsort()].tolist()

    def first(self, number: int, per_prompt: int) -> Panel:
        """Return the first images of a prompt, with a frame around those that are not as asked."""
        rows = self.rows(number)[:per_prompt]
        wrong = [i for i, row in enumerate(rows) if not self.hits[row]]
        return Panel([self.files[row] for row in rows], framed=wrong)

    def right(self, number: int) -> str:
        """Say how many of a prompt's images the judge finds as asked."""
        return f"{self.hits[self.rows(number)].mean():.0%}"


def _side_by_side(
    runs: Runs,
    numbers: list[int],
    path: Path,
    title: str,
    per_prompt: int,
    remarks: list[str] | None = None,
) -> None:
    samples = {model: _Samples(runs, model) for model in runs.models}
    cells = [[some.first(number, per_prompt) for some in samples.values()] for number in numbers]
    labels = []
    for i, number in enumerate(numbers):
        right = ", ".join(f"{model} {some.right(number)}" for model, some in samples.items())
        remark = f"  ({remarks[i]})" if remarks else ""
        labels.append(f"{_title(runs, number)}{remark}   as asked: {right}")
    save_png(sheet(cells, labels, runs.models, title), path)


def _numbers(runs: Runs, preferred: tuple[str, ...]) -> list[int]:
    """Number four prompts for exactly one artifact: the preferred ones, where there are such."""
    known = list(table_2_conditions(runs.vocabulary))
    names = [name for name in preferred if name in known] or known[:4]
    return [runs.vocabulary.names.index(name) for name in names]


def _title(runs: Runs, number: int) -> str:
    name, known = runs.vocabulary.names[number], runs.vocabulary.words
    return " + ".join(runs.vocabulary.word(a) if a in known else a for a in name.split("+"))


def _real_data(runs: Runs) -> ISICDataModule:
    known = next(
        (r["provenance"]["data"] for r in runs.samples.values() if r["provenance"]["data"]), None
    )
    if known is None or not Path(known["root"]).is_dir():
        raise Missing("from real images: score with --data.root FOLDER")
    same = ("root", "artifacts_csv", "threshold", "split", "split_seed", "resize")
    options = {name: known[name] for name in same}
    return ISICDataModule(**options, images=known["images_folder"], vocabulary=runs.vocabulary)
