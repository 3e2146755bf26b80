"""Figures of scores: which attribute leaks into which prompt; scores over a distance."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rl4med_ddpo.datamodules.vocabulary import Vocabulary

DPI = 110


def leakage_figure(matrices: dict[str, pd.DataFrame], path: Path, vocabulary: Vocabulary) -> None:
    """Draw matrices of `metrics.leak_matrix` side by side, for each model one.

    A frame marks what the prompt asks for; there the share should be 1, elsewhere 0. Colour is the
    error: red is an attribute that leaked in or failed to appear.
    """
    figure = Figure(figsize=(2.6 + 2.9 * len(matrices), 9.2), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    asked, attributes = vocabulary.conditions.numpy(), vocabulary.attributes
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        shares = matrix[list(attributes)].to_numpy(dtype=float)
        image = axis.imshow(
            np.abs(shares - asked), cmap=mpl.colormaps["Reds"].with_extremes(bad="0.9"),
            vmin=0, vmax=1, aspect="auto",
        )  # fmt: skip
        axis.set_title(title)
        axis.set_xticks(
            range(len(attributes)), [vocabulary.word(a) for a in attributes],
            rotation=35, ha="right",
        )  # fmt: skip
        axis.set_yticks(range(len(matrix)), [name.replace("_", " ") for name in matrix.index])
        for (row, column), share in np.ndenumerate(shares):
            wrong = abs(share - asked[row, column])
            text = "-" if np.isnan(share) else f"{share:.0%}"
            colour = "white" if wrong > 0.6 else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
            if asked[row, column]:
                axis.add_patch(Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, fill=False))
    figure.colorbar(image, ax=list(axes), shrink=0.4, label="share of images in error")
    figure.suptitle("Share of a prompt's images\nthat show an attribute (framed: asked for)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def curves_over(
    distances: Sequence[float], scores: Mapping[str, Sequence[float]], label: str
) -> Figure:
    """Draw scores over how far a policy has come, in the order of its training.

    Args:
        distances: One for each scoring.
        scores: By name, as many.
        label: What the distance is.
    """
    figure = Figure(figsize=(5, 3.2 * len(scores)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(scores), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, values) in zip(axes, scores.items(), strict=True):
        axis.plot(distances, values[-len(distances) :], marker="o", markersize=3)
        axis.set_ylabel(name)
    axes[-1].set_xlabel(label)
    return figure
