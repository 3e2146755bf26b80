import csv
from collections import Counter

import pandas as pd
import pytest

from rl4med_ddpo.datamodules.annotations import read_annotations
from rl4med_ddpo.datamodules.describe import describe, leaks, real_samples, subgroups, table_1
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.datamodules.splits import make_splits
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY


@pytest.fixture(scope="module")
def official(annotations_folder):
    return ISICDataModule(str(annotations_folder))


def test_table_1(official):
    counts = table_1(official.splits, DERMOSCOPY)
    assert counts.columns.tolist() == ["images", "MEL", "NV", "hair", "gel_bubble", "ink", "ruler"]
    assert counts.loc["train"].tolist() == [12_004, 2750, 9254, 4514, 1300, 201, 1608]
    assert counts.loc["val"].tolist() == [2_119, 454, 1665, 802, 228, 34, 308]
    assert counts.loc["test"].tolist() == [2_493, 537, 1956, 989, 257, 37, 341]


def test_subgroups_equal_a_recount_of_the_authors_files(official, annotations_folder):
    counts = subgroups(official.splits, DERMOSCOPY)
    assert len(counts) == 32
    for name in counts.columns:
        recount = Counter()
        with open(annotations_folder / "splits" / f"isic2019_{name}.csv", newline="") as file:
            for row in csv.DictReader(file):
                order = ("MEL", "NV", "hair", "gel_bubble", "ruler", "ink")
                recount[" + ".join(a for a in order if float(row[a]) == 1)] += 1
        assert {k: n for k, n in counts[name].items() if n} == recount
    empty = counts.index[counts["train"] == 0].tolist()
    assert empty == [
        "MEL + gel_bubble + ink",
        "MEL + hair + gel_bubble + ink",
        "MEL + hair + gel_bubble + ruler + ink",
    ]
    assert counts.loc["NV + hair + ink", "train"] == 8


def test_real_samples(official):
    counts = real_samples(official.splits.train, DERMOSCOPY)
    assert counts.columns.tolist() == ["hair", "gel_bubble", "ink", "ruler"]
    assert counts.loc["MEL"].tolist() == [543, 260, 4, 440]
    assert counts.loc["NV"].tolist() == [3051, 489, 21, 520]


def test_leaks_of_the_paper_split(official, annotations_folder):
    lesion = {}
    with open(annotations_folder / "ISIC_2019_Training_Metadata.csv", newline="") as file:
        for row in csv.DictReader(file):
            lesion[row["image"].removesuffix("_downsampled")] = row["lesion_id"]
    where, test_lesions = {}, []
    for name in ("train", "val", "test"):
        with open(annotations_folder / "splits" / f"isic2019_{name}.csv", newline="") as file:
            for row in csv.DictReader(file):
                if lesion[row["image"]]:
                    where.setdefault(lesion[row["image"]], set()).add(name)
                    test_lesions += [lesion[row["image"]]] * (name == "test")
    found = leaks(official.splits)
    assert set(found.index) == {name for name, splits in where.items() if len(splits) > 1}
    assert found.loc[found["train"] > 0, "test"].sum() == 1_267
    assert sum("train" in where[name] for name in test_lesions) == 1_267


def test_description(official):
    text = official.describe()
    for words in (
        "16,616 melanomas and nevi, split: paper (seed 42)",
        "781 MEL, 0 NV",
        "present if > 0.9",
        "test images that share a lesion with train: 1,267 of 2,493",
        "data.split=lesion",
    ):
        assert words in text
    lines = text.splitlines()
    cells = {
        line.split("  ")[0]: line.split()[-3:]
        for line in lines
        if line.startswith(("MEL +", "NV +"))
    }
    assert len(cells) == 30
    assert "MEL + gel_bubble + ink                      0 *      1        0 *" in text
    total = next(line for line in lines if line.startswith("all "))
    assert total.split()[1:] == ["12,004", "2,119", "2,493"]
    ours = next(i for i, line in enumerate(lines) if line.startswith("train "))
    assert lines[ours].split()[1:] == lines[ours + 1].split()[2:], "our counts are the paper's"


def test_description_needs_no_image(folder):
    for path in folder.images.iterdir():
        path.unlink()
    folder.images.rmdir()
    text = ISICDataModule(str(folder.root), split="lesion").describe()
    assert "lesions: 0" in text
    assert "such as" not in text
    assert "39 melanomas and nevi, split: lesion (seed 42)" in text


def test_a_planted_leak_is_named(folder, tmp_path):
    ids = folder.ids
    for name, some in {"train": ids[2:4], "val": ids[6:7], "test": ids[4:6]}.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(["image", *some]))
    annotations = read_annotations(folder.root)
    splits = make_splits(annotations.frame, str(tmp_path))
    assert leaks(splits).to_dict("index") == {"HAM_0000001": {"train": 1, "val": 0, "test": 2}}
    text = describe(annotations, splits, "> 0.9", "given", DERMOSCOPY)
    assert "such as HAM_0000001 (train 1, val 0, test 2)" in text
    assert "share a lesion with train: 2 of 2" in text


def test_real_folder_has_the_counts_of_its_readme(real_folder):
    module = ISICDataModule(str(real_folder), split=str(real_folder / "splits"))
    counts = table_1(module.splits, DERMOSCOPY)
    assert counts.loc["train"].tolist() == [887, 370, 517, 303, 209, 154, 304]
    assert counts.loc["val"].tolist() == [140, 48, 92, 45, 33, 24, 49]
    assert counts.loc["test"].tolist() == [173, 72, 101, 59, 36, 29, 56]
    alone = real_samples(pd.concat(module.splits), DERMOSCOPY)
    assert alone.loc["MEL"].tolist() == [80, 52, 5, 82]
    assert alone.loc["NV"].tolist() == [155, 99, 20, 97]
