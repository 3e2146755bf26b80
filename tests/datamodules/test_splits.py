from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from rl4med_ddpo.datamodules.annotations import read_annotations
from rl4med_ddpo.datamodules.splits import make_splits
from rl4med_ddpo.foundation.errors import UserError
from support.dermoscopy import ATTRIBUTES


@pytest.fixture(scope="module")
def official(annotations_folder):
    return read_annotations(annotations_folder).frame


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_paper_split_equals_the_authors_files_row_for_row(official, annotations_folder, name):
    ours = getattr(make_splits(official, "paper"), name)
    theirs = pd.read_csv(annotations_folder / "splits" / f"isic2019_{name}.csv")
    assert ours["id"].tolist() == theirs["image"].tolist()
    assert (ours[list(ATTRIBUTES)].to_numpy() == theirs[list(ATTRIBUTES)].to_numpy()).all()


def test_given_split_equals_the_paper_split(official, annotations_folder):
    given = make_splits(official, str(annotations_folder / "splits"))
    for ours, theirs in zip(given, make_splits(official, "paper"), strict=True):
        pd.testing.assert_frame_equal(ours, theirs)


@pytest.mark.parametrize("seed", [0, 42])
def test_lesion_split_keeps_lesions_together(official, seed):
    splits = make_splits(official, "lesion", seed)
    assert [len(rows) for rows in splits] == [12_004, 2_119, 2_493]
    assert sorted(pd.concat(splits)["id"]) == official["id"].tolist()
    seen = [set(rows["lesion_id"]) - {""} for rows in splits]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert all((rows["lesion_id"] == "").any() for rows in splits), "a blank is no common lesion"


def test_seeds_matter_and_repeat(official):
    for split in ("paper", "lesion"):
        first, again, other = (make_splits(official, split, seed) for seed in (1, 1, 2))
        assert first.test["id"].tolist() == again.test["id"].tolist()
        assert set(first.test["id"]) != set(other.test["id"])


def test_lesion_split_of_few_images(folder):
    frame = read_annotations(folder.root).frame
    splits = make_splits(frame, "lesion")
    assert [len(rows) for rows in splits] == [28, 5, 6]
    where = Counter()
    for rows in splits:
        where.update(set(rows["lesion_id"]) - {""})
    assert set(where.values()) == {1}


def write_splits(folder, **ids):
    for name, some in ids.items():
        (folder / f"isic2019_{name}.csv").write_text(
            "\n".join(["image,MEL", *(f"{i},0" for i in some)])
        )
    return str(folder)


def test_given_split_keeps_order_and_leaves_the_rest_out(folder, tmp_path):
    frame = read_annotations(folder.root).frame
    i = folder.ids
    given = write_splits(
        tmp_path, train=[i[9], i[2], i[5] + "_downsampled"], val=[i[0]], test=[i[3]]
    )
    write_splits(tmp_path, all=i)
    splits = make_splits(frame, given)
    assert splits.train["id"].tolist() == [i[9], i[2], i[5]]
    assert splits.val["stem"].tolist() == ["ISIC_0000000_downsampled"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"val": [2, 2]}, ["isic2019_val.csv", "given twice", "ISIC_0000002 in lines 2, 3"]),
        ({"val": [3]}, ["isic2019_val.csv", "isic2019_test.csv", "1 image(s)", "ISIC_0000003"]),
        ({"val": [2, 99]}, ["isic2019_val.csv", "1 of 2 image(s)", "39 melanomas", "ISIC_0000099"]),
        ({"test": [1]}, ["isic2019_test.csv", "ISIC_0000001"]),
        ({"train": []}, ["isic2019_train.csv", "empty"]),
        ({"val2": [5]}, ["2 files *val*.csv: isic2019_val.csv, isic2019_val2.csv"]),
    ],
)
def test_malformed_split_files(folder, tmp_path, changed, words):
    frame = read_annotations(folder.root).frame
    numbers = {"train": [4, 6, 8], "val": [2], "test": [3], **changed}
    given = write_splits(tmp_path, **{k: [f"ISIC_{n:07d}" for n in v] for k, v in numbers.items()})
    with pytest.raises(UserError) as caught:
        make_splits(frame, given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_missing_split_file_and_folder(folder, tmp_path):
    frame = read_annotations(folder.root).frame
    given = write_splits(tmp_path, train=folder.ids[:1], val=folder.ids[2:3])
    Path(given, "._test.csv").write_bytes(b"\0\5\x16\7")
    with pytest.raises(UserError, match=r"holds no file \*test\*\.csv"):
        make_splits(frame, given)
    with pytest.raises(UserError, match=r"'lesion' or a folder .* there is no folder papr"):
        make_splits(frame, "papr")


@pytest.mark.parametrize(("split", "n"), [("paper", 2), ("lesion", 1)])
def test_empty_split(folder, split, n):
    frame = read_annotations(folder.root).frame.head(n)
    with pytest.raises(UserError, match=f"'{split}' of {n} images leaves train"):
        make_splits(frame, split)
