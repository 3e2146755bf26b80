"""Figures of scores: which attribute leaks into which prompt; scores over a distance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rl4med_ddpo.datamodules.vocabulary import Vocabulary

DPI = 110


def leakage_figure(
    matrices: dict[str, pd.DataFrame],
    path: Path,
    vocabulary: Vocabulary,
    by_reward: Mapping[str, bool],
) -> None:
    """Draw matrices of `metrics.leak_matrix` side by side, for each model one.

    A frame marks what the prompt asks for; there the share should be 1, elsewhere 0. Colour is the
    error: red is an attribute that leaked in or failed to appear.

    Args:
        matrices: By the model's name.
        path: Of the PNG to write.
        vocabulary: The attributes and prompts.
        by_reward: Of each model, whether the reward network read the attributes of `one_of`, for
            want of a judge that does; they are marked with a star.
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
        starred = vocabulary.one_of if by_reward[title] else ()
        names = [vocabulary.word(a) + "*" * (a in starred) for a in attributes]
        axis.set_xticks(range(len(attributes)), names, rotation=35, ha="right")
        axis.set_yticks(range(len(matrix)), [name.replace("_", " ") for name in matrix.index])
        for (row, column), share in np.ndenumerate(shares):
            wrong = abs(share - asked[row, column])
            text = "-" if np.isnan(share) else f"{share:.0%}"
            colour = "white" if wrong > 0.6 else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
            if asked[row, column]:
                axis.add_patch(Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, fill=False))
    figure.colorbar(image, ax=list(axes), shrink=0.4, label="share of images in error")
    said = "Share of a prompt's images\nthat show an attribute (framed: asked for)"
    if any(by_reward.values()) and vocabulary.one_of:
        said += "\n* read by the reward network, not by the judge"
    figure.suptitle(said)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def frontier_figure(models: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw APR over the distance to real images and over diversity, a curve over guidance a model.

    The ring marks the guidance that a model is best at on validation noise.

    Args:
        models: What `callbacks.Frontier` measured, by the model's name.
    """
    figure = Figure(figsize=(9.6, 4.4), dpi=DPI, layout="constrained")
    over = {
        "distance": "kernel distance to real images (less is better)",
        "diversity_right": "diversity among images read right",
    }
    for axis, (score, label) in zip(figure.subplots(1, 2, sharey=True), over.items(), strict=True):
        for name, result in models.items():
            points = [p for p in result["points"] if p[score]["value"] is not None]
            x = [p[score]["value"] for p in points]
            y = [100 * p["apr"] for p in points]
            errors = np.abs(100 * np.array([p["apr_interval"] for p in points]).T - y)
            bars = axis.errorbar(x, y, errors, marker="o", markersize=3, capsize=2, label=name)
            colour = bars.lines[0].get_color()
            for point, across, up in zip(points, x, y, strict=True):
                axis.annotate(
                    f"{point['guidance']:g}", (across, up), (4, 4), fontsize=7, color=colour,
                    textcoords="offset points",
                )  # fmt: skip
                if len(x) > 1 and point["guidance"] == result["best_guidance"]:
                    axis.plot(across, up, "o", markersize=10, fillstyle="none", color=colour)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        real = next(iter(models.values()))["real"].get(score)
        if real and real["value"] is not None:
            axis.axvline(real["value"], color="0.4", linestyle=":", label="real images")
    axes = figure.axes
    axes[0].set_ylabel("APR in %, with 95% interval")
    axes[1].legend(fontsize=8)
    figure.suptitle("Each point a guidance scale; ringed: best on validation noise")
    return figure


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
