"""The paper's tables, ours next to the paper's, as data frames of text."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from rl4med_ddpo.datamodules.describe import (
    PAPER_REAL_SAMPLES,
    PAPER_TABLE_1,
    is_papers,
    table_order,
)
from rl4med_ddpo.metrics.alignment import prompt_numbers, table_2_conditions
from rl4med_ddpo.metrics.augmentation import table_4
from rl4med_ddpo.metrics.frontier import LEAST
from rl4med_ddpo.metrics.intervals import mcnemar
from rl4med_ddpo.metrics.real_images import FEW
from rl4med_ddpo.report import paper
from rl4med_ddpo.report.cells import gain, gain_cell, paired_hits, percent, score_cell, value_cell
from rl4med_ddpo.report.runs import Missing, Runs

ARMS = {
    "real": "Real",
    "oversampling": "Real + oversampling",
    "classical": "Real + classical",
    "sd": "Real + SD",
    "sd_rl": "Real + SD-RL",
}
TEST = "rl4med-ddpo test --config ddpo.yaml"
COMMANDS = {
    "SD": f"{TEST} --model.policy null --trainer.default_root_dir runs/sd",
    "SD+RL": TEST,
    "table4": "python -m rl4med_ddpo.experiments.table_4 --classifier classifier.yaml --run runs",
}


class Table(NamedTuple):
    """A table with what a reader needs to know.

    Attributes:
        title: One line.
        rows: All text.
        notes: Below the table.
    """

    title: str
    rows: pd.DataFrame
    notes: list[str]


def require_models(runs: Runs) -> None:
    """Raise Missing unless SD and a model that was trained from it are scored."""
    absent = [m for m in ("SD", *(() if runs.trained else ("SD+RL",))) if m not in runs.samples]
    commands = [f"`{COMMANDS[m]}`" for m in absent]
    if commands:
        raise Missing(f"made by: {', then '.join(commands)}")


def require_frontiers(runs: Runs) -> None:
    """Raise Missing unless a model was measured over guidance."""
    if not runs.frontiers:
        command = '`rl4med-ddpo test --config ddpo.yaml --frontier.guidances "[1, 2, 3, 5, 7.5]"`'
        raise Missing(f"made by: {command}, and the same with `--model.policy null`")


def counts_of(runs: Runs) -> dict[str, Any]:
    """Return the counts of the real images, which any scored model has."""
    for results in runs.samples.values():
        if "counts" in results:
            return results["counts"]
    raise Missing(f"made by: `{COMMANDS['SD']} --data.root FOLDER` (with real images)")


def split_table(runs: Runs) -> Table:
    """Lay out Table 1: what the splits hold."""
    counts, order = counts_of(runs)["table_1"], table_order(runs.vocabulary)
    rows = []
    for name, count in counts.items():
        rows.append({"split": name, **{c: f"{count[c]:,}" for c in ("images", *order)}})
        if name in PAPER_TABLE_1 and is_papers(runs.vocabulary):
            known = (sum(PAPER_TABLE_1[name][:2]), *PAPER_TABLE_1[name])
            columns = dict(zip(("images", *order), (f"{n:,}" for n in known), strict=False))
            rows.append({"split": f"{name}, paper", **columns})
    data = next(r["provenance"]["data"] for r in runs.samples.values() if "counts" in r)
    note = (
        f"Data {data['root']}, split {data['split']}, artifact present above {data['threshold']}."
    )
    return Table("Table 1. Images of each split", pd.DataFrame(rows), [note])


def apr_table(runs: Runs) -> Table:
    """Lay out Table 2: APR of the prompts that ask for one artifact, ours next to the paper's."""
    require_models(runs)
    rows, vocabulary = [], runs.vocabulary
    columns = table_2_conditions(vocabulary)
    samples = next(
        (r["counts"]["real_samples"] for r in runs.samples.values() if "counts" in r), {}
    )
    real = {f"{d}+{a}": n for d, row in samples.items() for a, n in row.items()}
    rows.append({"": "# real samples", **{c: str(real.get(c, "-")) for c in columns}})
    papers = is_papers(vocabulary)
    if papers:
        order = ("hair", "gel_bubble", "ink", "ruler")
        known = {
            f"{disease}+{artifact}": n
            for disease, row in PAPER_REAL_SAMPLES.items()
            for artifact, n in zip(order, row, strict=True)
        }
        rows.append({"": "# real samples, paper", **{c: str(known[c]) for c in columns}})
    for model in runs.models:
        entries = runs.samples[model]["table_2"]
        rows.append({"": f"{model}, APR %", **{c: percent(entries[c]) for c in columns}})
        if papers and model in paper.TABLE_2:
            theirs = paper.TABLE_2[model]
            rows.append({"": f"{model}, paper", **{c: f"{theirs[c]}" for c in columns}})
    hits = paired_hits(runs)
    asked = prompt_numbers(runs.manifest("SD"), vocabulary)
    for model in runs.trained:
        of_each = {c: asked == vocabulary.keys.index(key) for c, key in columns.items()}
        gains = {c: gain(hits, model, rows_of) for c, rows_of in of_each.items()}
        rows.append({"": f"{model} - SD, points", **gains})
    n = runs.samples["SD"]["table_2"][next(iter(columns))]["n"]
    notes = [
        f"n = {n} images a prompt, the same noise for all models; 95% Wilson intervals, paired "
        "differences with Newcombe's; 'no evidence' where the interval holds 0.",
    ]
    return Table("Table 2. APR of prompts with one artifact", pd.DataFrame(rows), notes)


def quality_table(runs: Runs) -> Table:
    """Lay out Table 3: APR over all prompts, FID, LPIPS, and substitutes for missing weights."""
    require_models(runs)
    columns = {model: _quality(runs.samples[model]) for model in runs.models}
    if alone := runs.frontiers.get("SD"):
        # what guidance alone gives stands beside what training does at the same guidance
        best = next(p for p in alone["points"] if p["guidance"] == alone["best_guidance"])
        for model in runs.models:
            points = runs.frontiers.get(model, {}).get("points", [])
            same = [p for p in points if p["guidance"] == alone["guidance"]]
            columns[model] |= _beside_guidance(same[0]) if same else {}
        at_best = {"APR %": percent(best)} | _beside_guidance(best)
        title = f"SD, best guidance {best['guidance']:g}"
        columns = {"SD": columns["SD"], title: at_best, **columns}
    for model, theirs in paper.TABLE_3.items() if is_papers(runs.vocabulary) else ():
        columns[f"{model}, paper"] = {
            "APR %": f"{theirs['apr']}", "FID": f"{theirs['fid']}", "LPIPS": f"{theirs['lpips']}",
        }  # fmt: skip
    order = list(dict.fromkeys(score for column in columns.values() for score in column))
    table = pd.DataFrame(columns).reindex(order).rename_axis("score").reset_index()
    notes = []
    hits = paired_hits(runs)
    for model in runs.trained:
        everything = gain(hits, model, slice(None))
        notes.append(
            f"APR, {model} - SD at the same guidance: {everything} points; McNemar p = "
            f"{_mcnemar(hits, model):.2g}."
        )
    some = runs.samples[runs.trained[0]]
    if "features" in some:
        network = some["features"]["classifier"]
        notes.append(
            f"classifier features: those of the judge ({network['network']}, "
            f"{network['dimensions']} features, weights {_named(network)}); not "
            "Inception's, so not FID. The floor is the distance of two real halves."
        )
        notes.append(
            "In square brackets 95% intervals; in round ones, for the floor and at its n, the "
            "least and the greatest of five halvings."
        )
        notes.append("Real mix: fakes weighed as their prompts are frequent among test images.")
    notes += [f"Not computed: {why}." for why in dict.fromkeys(some["unavailable"].values())]
    title = f"Table 3. Alignment and quality over the {len(runs.vocabulary.keys)} prompts"
    return Table(title, table.fillna("-"), notes)


def _beside_guidance(point: dict[str, Any]) -> dict[str, str]:
    """Return what was measured over guidance alone, at one, as cells of Table 3."""
    return {
        "diversity among images read right": value_cell(point["diversity_right"], 2),
        "kernel distance, frontier's real images": value_cell(point["distance"], 3),
    }


def frontier_table(runs: Runs) -> Table:
    """Lay out each model over guidance: alignment, diversity, distance and the worst prompt."""
    require_frontiers(runs)
    rows, some = [], next(iter(runs.frontiers.values()))
    for model, result in runs.frontiers.items():
        several = len(result["points"]) > 1
        best = [p for p in result["points"] if several and p["guidance"] == result["best_guidance"]]
        for point in result["points"]:
            worst, apr = next(iter(point["worst_prompts"].items()))
            rows.append(
                {
                    "model": f"{model} (best)" if point in best else model,
                    "guidance": f"{point['guidance']:g}",
                    "APR %": percent(point),
                    "reward": f"{point['reward']:.3f}",
                    "diversity, read right": value_cell(point["diversity_right"], 2),
                    "prompts left out": str(len(point["diversity_right"]["left_out"])),
                    "distance": value_cell(point["distance"], 3),
                    "worst prompt": f"{worst} {100 * apr:.0f} %",
                }
            )
    notes = [
        "Guidance costs nothing, so a gain of training is one over SD at its best guidance: that "
        "of the highest APR on validation noise.",
        f"Diversity is the mean distance, in the judge's features, of two images of a prompt that "
        f"the judge reads right; of {some['real']['n']:,} real images "
        f"{value_cell(some['real']['diversity_right'], 2)}. Prompts with fewer than {LEAST} right "
        "images are left out.",
        f"Distance is the kernel distance, in the judge's features, to {some['real']['folder']}.",
    ]
    return Table("SD and what was trained, over guidance", pd.DataFrame(rows), notes)


def augmentation_table(runs: Runs) -> Table:
    """Lay out Table 4: the classifier with and without added images."""
    absent = [arm for arm in ARMS if len(runs.arms.get(arm, {})) < 3]
    if absent:
        raise Missing(f"three seeds each of {', '.join(absent)} made by: `{COMMANDS['table4']}`")
    scores = augmentation_scores(runs)
    rows = []
    for attribute in scores["attribute"].unique():
        for arm, title in ARMS.items():
            of_arm = scores[(scores["attribute"] == attribute) & (scores["arm"] == arm)]
            cells = {row["score"]: row for row in of_arm.to_dict("records")}
            row = {"attribute": runs.vocabulary.words[attribute], "training": title}
            for score, name in (("f1", "F1"), ("accuracy", "accuracy %"), ("auroc", "AUROC")):
                row[name] = score_cell(cells[score], 100 if score == "accuracy" else 1)
                row[f"{name.split()[0]} vs real"] = gain_cell(cells[score])
            if is_papers(runs.vocabulary):
                theirs = paper.TABLE_4.get(arm, {}).get(attribute)
                row["paper F1, accuracy"] = f"{theirs[0]:.2f}, {theirs[1]:.2f}" if theirs else "-"
            rows.append(row)
    first = scores.iloc[0]
    notes = [
        f"n = {first['n']} real test images, {first['seeds']} seeds; 95% intervals from lesions "
        "resampled and from the spread over seeds; p corrected (Holm) over all comparisons of a "
        "score; 'no evidence' where the interval of the difference holds 0 or p >= 0.05.",
    ]
    return Table("Table 4. The classifier on real and augmented data", pd.DataFrame(rows), notes)


def augmentation_scores(runs: Runs) -> pd.DataFrame:
    """Return every score of Table 4 with its interval and comparison, as numbers."""
    order = {arm: runs.arms[arm] for arm in ARMS if arm in runs.arms}
    first = next(iter(next(iter(order.values())).values()))
    return table_4(order, [a for a in runs.vocabulary.words if f"p_{a}" in first])


def subgroup_table(runs: Runs) -> Table:
    """List all subgroups: real images, what the judge makes of them, and the models' APR."""
    require_models(runs)
    hits, asked = paired_hits(runs), prompt_numbers(runs.manifest("SD"), runs.vocabulary)
    results = runs.samples["SD"]
    counts = counts_of(runs)["subgroups"]
    rows = []
    for i, name in enumerate(runs.vocabulary.names):
        real = results["real"]["prompts"][name]
        row = {"subgroup": name, "train": str(counts["train"][i]), "test": str(real["n"])}
        flag = f" ({real['flag']})" if real.get("flag") and real["n"] else ""
        row["real test read right %"] = percent(real) + flag if real["n"] else "not estimable"
        for model in runs.models:
            row[f"{model} APR %"] = percent(runs.samples[model]["prompts"][name])
        row |= {f"{model} - SD": gain(hits, model, asked == i) for model in runs.trained}
        rows.append(row)
    total = {
        "subgroup": "all",
        "train": str(sum(counts["train"])),
        "test": str(results["real"]["n"]),
    }
    total["real test read right %"] = percent(results["real"])
    total |= {f"{m} APR %": percent(runs.samples[m]) for m in runs.models}
    rows.append(total | {f"{m} - SD": gain(hits, m, slice(None)) for m in runs.trained})
    sources = ", ".join(f"{s} {percent(e)}" for s, e in results["real"]["sources"].items())
    absent = ", ".join(f"{a} {percent(e)}" for a, e in results["real"]["absent"].items())
    notes = [
        f"Flagged below n = {FEW}. Real test images by source: {sources}.",
        f"Label noise caps APR: where a label says absent the judge agrees for {absent} %.",
    ]
    return Table(f"All {len(runs.vocabulary.keys)} subgroups", pd.DataFrame(rows), notes)


BUILDERS: Mapping[str, Callable[[Runs], Table]] = {
    "table_1": split_table,
    "table_2": apr_table,
    "table_3": quality_table,
    "table_4": augmentation_table,
    "subgroups": subgroup_table,
    "frontier": frontier_table,
}


def _named(network: dict[str, Any]) -> str:
    """Name weights by their digest; results of before 0.2 have a sha256."""
    return network.get("digest") or network["sha256"][:12]


def _mcnemar(hits: pd.DataFrame, model: str) -> float:
    one, other = hits["SD"], hits[model]
    return mcnemar(int((one & ~other).sum()), int((~one & other).sum()))


def _quality(results: dict[str, Any]) -> dict[str, str]:
    distances = results.get("distribution", {})
    six = results.get("apr6")
    # results of 0.1 do not say who read: it was the reward network
    by_judge = six is not None and six.get("read_by") == "judge"
    cells = {
        "APR %": percent(results),
        "APR6 %" if by_judge else "APR6 %, read by the reward": percent(six) if six else "-",
    }
    inception = distances.get("inception", {})
    cells["FID"] = value_cell(inception.get("frechet"), 2)
    cells["KID"] = value_cell(inception.get("kernel"), 4)
    cells["LPIPS"] = value_cell(results.get("lpips"), 3)
    ours = distances.get("classifier", {})
    for title, name, digits in (
        ("kernel distance, classifier features", "kernel", 3),
        ("kernel distance, real mix", "kernel_real_mix", 3),
        ("Frechet distance, classifier features", "frechet", 2),
        ("Frechet distance, real mix", "frechet_real_mix", 2),
        ("Frechet distance, at the floor's n", "frechet_equal_n", 2),
        ("noise floor, real against real", "noise_floor", 2),
        ("precision", "precision", 2),
        ("recall", "recall", 2),
        ("density", "density", 2),
        ("coverage", "coverage", 2),
        ("spread within a prompt, wrong attributes included", "diversity", 2),
        ("of real images, wrong labels included", "diversity_real", 2),
    ):
        cells[title] = value_cell(ours.get(name), digits)
    if "copies" in results:
        copies = results["copies"]
        cells["copies of training images"] = f"{copies['copies']} of {copies['n']:,}"
    return cells
