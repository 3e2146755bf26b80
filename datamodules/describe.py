"""Count what the splits hold, as the paper's tables do, and put it into words."""

import pandas as pd

from rl4med_ddpo.datamodules.annotations import Annotations
from rl4med_ddpo.datamodules.splits import Splits
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY, Vocabulary

PAPER_TABLE_1 = {
    "train": (2750, 9254, 4514, 1300, 201, 1608),
    "val": (454, 1665, 802, 228, 34, 308),
    "test": (537, 1956, 989, 257, 37, 341),
}
PAPER_REAL_SAMPLES = {"MEL": (543, 260, 4, 440), "NV": (3051, 489, 21, 520)}
"""Row '# Real Sample' of Table 2, for hair, gel bubbles, ink and ruler."""


def is_papers(vocabulary: Vocabulary) -> bool:
    """Tell whether the attributes are the paper's, so that its counts can be compared with ours."""
    return vocabulary.attributes == DERMOSCOPY.attributes


def table_order(vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return the attributes in the order of the paper's tables."""
    if is_papers(vocabulary):
        return ("MEL", "NV", "hair", "gel_bubble", "ink", "ruler")
    return vocabulary.one_of + vocabulary.any_of


def table_1(splits: Splits, vocabulary: Vocabulary) -> pd.DataFrame:
    """Count the images and the attributes of each split."""
    rows = {
        name: [len(rows), *(int(rows[a].sum()) for a in table_order(vocabulary))]
        for name, rows in splits._asdict().items()
    }
    return pd.DataFrame.from_dict(rows, "index", columns=["images", *table_order(vocabulary)])


def subgroups(splits: Splits, vocabulary: Vocabulary) -> pd.DataFrame:
    """Count the images of each of the subgroups, in the vocabulary's order, in each split."""
    keys, attributes = list(vocabulary.keys), list(vocabulary.attributes)
    names = [name.replace("+", " + ") for name in vocabulary.names]
    counts = {
        name: rows.groupby(attributes).size().reindex(keys, fill_value=0).to_numpy()
        for name, rows in splits._asdict().items()
    }
    return pd.DataFrame(counts, index=names)


def real_samples(rows: pd.DataFrame, vocabulary: Vocabulary) -> pd.DataFrame:
    """Count the images of each disease with exactly one artifact, as in Table 2's first row."""
    ones = vocabulary.one_of
    alone = rows[rows[list(vocabulary.any_of)].sum(axis=1) == 1]
    several = [a for a in table_order(vocabulary) if a in vocabulary.any_of]
    return pd.DataFrame([alone.loc[alone[d] == 1, several].sum() for d in ones], ones)


def leaks(splits: Splits) -> pd.DataFrame:
    """List the lesions that have images in more than one split.

    Returns:
        Indexed by `lesion_id`: the number of the lesion's images in `train`, `val` and `test`.
    """
    counts = pd.DataFrame(
        {name: rows["lesion_id"].value_counts() for name, rows in splits._asdict().items()}
    )
    counts = counts.drop(index="", errors="ignore").fillna(0).astype(int).sort_index()
    return counts[(counts > 0).sum(axis=1) > 1]


def describe(
    annotations: Annotations, splits: Splits, rule: str, split: str, vocabulary: Vocabulary
) -> str:
    """Word all counts.

    Args:
        annotations: The joined table.
        splits: Its splits.
        rule: When an artifact is present, such as `> 0.9`.
        split: How the splits were made.
        vocabulary: The attributes.
    """
    every, papers = pd.concat(splits), is_papers(vocabulary)
    without = annotations.without_artifacts
    left_out = ", ".join(f"{n:,} {disease}" for disease, n in without.items())
    lines = [
        f"{len(every):,} {'melanomas and nevi' if papers else 'images'}, split: {split}",
        f"{'artifacts' if papers else 'labels'} from {annotations.artifacts_csv}, "
        f"present if {rule}",
        *([f"left out, for want of a row there: {left_out}"] if without else []),
        "",
        *_paper_tables(splits, vocabulary),
        f"The {len(vocabulary.keys)} subgroups (0 *: no image in that split)",
        _text(_with_total(subgroups(splits, vocabulary)), mark_zero=True),
        "",
        "Lesions in more than one split",
        *_leak_lines(splits),
        "",
        "Images by source (the part of lesion_id before the number; -: no lesion_id)",
        _text(_by_source(every, vocabulary)),
    ]
    return "\n".join(lines)


def _paper_tables(splits: Splits, vocabulary: Vocabulary) -> list[str]:
    if not is_papers(vocabulary):
        return ["Images of each split", _text(table_1(splits, vocabulary)), ""]
    return [
        "Table 1. Images of each split (the paper's counts below ours)",
        _text(_beside_paper(table_1(splits, vocabulary))),
        "",
        "Table 2, '# Real Sample'. Training images with exactly one artifact",
        _text(_real_samples_beside_paper(splits.train, vocabulary)),
        "",
    ]


def _beside_paper(ours: pd.DataFrame) -> pd.DataFrame:
    paper = {
        f"  {name}, paper": [sum(counts[:2]), *counts] for name, counts in PAPER_TABLE_1.items()
    }
    both = pd.concat([ours, pd.DataFrame.from_dict(paper, "index", columns=ours.columns)])
    return both.loc[[row for name in ours.index for row in (name, f"  {name}, paper")]]


def _with_total(counts: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([counts, counts.sum().to_frame("all").T])


def _real_samples_beside_paper(train: pd.DataFrame, vocabulary: Vocabulary) -> pd.DataFrame:
    ours = real_samples(train, vocabulary)
    paper = pd.DataFrame.from_dict(PAPER_REAL_SAMPLES, "index", columns=ours.columns)
    both = pd.concat([ours, paper.rename(index="  {}, paper".format)])
    return both.loc[[row for d in vocabulary.one_of for row in (d, f"  {d}, paper")]]


def _leak_lines(splits: Splits) -> list[str]:
    leaking = leaks(splits)
    with_train = int(leaking.loc[leaking["train"] > 0, "test"].sum())
    blank = sum(int((rows["lesion_id"] == "").sum()) for rows in splits)
    lines = [
        f"  lesions: {len(leaking):,}",
        f"  test images that share a lesion with train: {with_train:,} of {len(splits.test):,}",
        f"  images without lesion_id, which nobody can check: {blank:,}",
    ]
    if len(leaking):
        shown = "; ".join(
            f"{lesion} (train {n.train}, val {n.val}, test {n.test})"
            for lesion, n in leaking.head(3).iterrows()
        )
        lines += [f"  such as {shown}", "  data.split=lesion keeps each lesion in one split"]
    return lines


def _by_source(rows: pd.DataFrame, vocabulary: Vocabulary) -> pd.DataFrame:
    by_source = rows.assign(images=1, source=rows["source"].replace("", "-")).groupby("source")
    return by_source[["images", *table_order(vocabulary)]].sum().rename_axis(None)


def _text(counts: pd.DataFrame, mark_zero: bool = False) -> str:
    zero = "0 *" if mark_zero else "0"
    text = counts.map(lambda n: f"{n:,}" + "  " * mark_zero if n else zero)
    return text.to_string()
