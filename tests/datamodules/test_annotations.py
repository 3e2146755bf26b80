import csv

import pytest

from rl4med_ddpo.datamodules.annotations import read_annotations
from rl4med_ddpo.foundation.errors import UserError
from support.dermoscopy import ARTIFACTS, ATTRIBUTES


def read(path, delimiter=","):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def slow_join(root, artifacts_csv, delimiter=",", threshold=0.9):
    """The rule of the paper in plain loops: {id: (stem, lesion, the six attributes)}."""
    plain = lambda name: name.removesuffix(".png").removesuffix("_downsampled")  # noqa: E731
    artifacts = {plain(row["image"]): row for row in read(artifacts_csv, delimiter)}
    lesions = {
        row["image"]: row["lesion_id"] for row in read(root / "ISIC_2019_Training_Metadata.csv")
    }
    joined = {}
    for row in read(root / "ISIC_2019_Training_GroundTruth.csv"):
        diseases = [int(float(row["MEL"])), int(float(row["NV"]))]
        name = plain(row["image"])
        if sum(diseases) == 1 and name in artifacts:
            present = [int(float(artifacts[name][a]) > threshold) for a in ARTIFACTS]
            joined[name] = (row["image"], lesions[row["image"]], *present, *diseases)
    return joined


@pytest.mark.parametrize(
    ("name", "delimiter", "threshold"),
    [
        ("isic_inferred_wocarcinoma.csv", ",", 0.9),
        ("isic_inferred_wocarcinoma.csv", ",", 0.5),
        ("isic_bias.csv", ";", 0.9),
    ],
)
def test_join_equals_a_slow_recount(annotations_folder, name, delimiter, threshold):
    path = annotations_folder / name
    frame = read_annotations(annotations_folder, path, threshold).frame
    expected = slow_join(annotations_folder, path, delimiter, threshold)
    columns = ["id", "stem", "lesion_id", *ATTRIBUTES]
    assert [tuple(row) for row in frame[columns].itertuples(index=False)] == [
        (name, *expected[name]) for name in sorted(expected)
    ]


def test_counts_of_the_official_tables(annotations_folder):
    found = read_annotations(annotations_folder)
    assert found.artifacts_csv.name == "isic_inferred_wocarcinoma.csv"
    assert len(found.frame) == 16_616
    assert found.without_artifacts == {"MEL": 781, "NV": 0}
    assert set(found.frame["source"]) == {"", "HAM", "BCN", "MSK"}


def test_real_folder_finds_its_annotations(real_folder):
    found = read_annotations(real_folder)
    assert found.artifacts_csv == real_folder / "annotations" / "isic_inferred_wocarcinoma.csv"
    assert len(found.frame) == 1200
    assert found.without_artifacts == {"MEL": 8, "NV": 0}


def test_tiny_folder(folder):
    found = read_annotations(folder.root).frame.set_index("id")
    assert found.index.tolist() == [name for i, name in enumerate(folder.ids) if i != 1]
    assert found["MEL"].tolist() == [int(i % 4 == 0) for i in range(40) if i != 1]
    assert found["gel_bubble"].sum() == 14
    assert found["ruler"].sum() == 0, "0.9 is not greater than 0.9"
    assert found.loc["ISIC_0000005", "stem"] == "ISIC_0000005_downsampled"
    assert found.loc["ISIC_0000007", "lesion_id"] == ""
    assert read_annotations(folder.root, threshold=0.89).frame["ruler"].sum() == 8


def test_a_table_of_zeros_and_ones(folder, tmp_path):
    path = tmp_path / "by_hand.csv"
    path.write_text("image,ink,ruler,gel_bubble,hair\nISIC_0000000,1,0,0,1\nISIC_0000002,0,0,1,0\n")
    for threshold in (0.0, 0.9):
        found = read_annotations(folder.root, path, threshold)
        assert found.frame[list(ATTRIBUTES)].to_numpy().tolist() == [
            [1, 0, 0, 1, 1, 0],
            [0, 1, 0, 0, 0, 1],
        ]
    assert found.without_artifacts == {"MEL": 9, "NV": 28}


def test_inferred_comes_before_bias(folder):
    bias = folder.root / "isic_bias.csv"
    bias.write_text(";image;hair;gel_bubble;ruler;ink\n0;ISIC_0000000.png;0;0;0;0\n")
    assert len(read_annotations(folder.root).frame) == 39
    folder.artifacts.unlink()
    assert len(read_annotations(folder.root).frame) == 1


def check(folder, *words, **kwargs):
    with pytest.raises(UserError) as caught:
        read_annotations(folder.root, **kwargs)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_missing_folder(folder):
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        read_annotations(folder.root / "nowhere")


@pytest.mark.parametrize("table", ["truth", "metadata", "artifacts"])
def test_missing_table(folder, table):
    path = getattr(folder, table)
    path.unlink()
    check(folder, str(path), "missing" if table != "artifacts" else "looked for", "https://")


def test_given_artifact_file_is_missing(folder):
    check(folder, "mine.csv", artifacts_csv=folder.root / "mine.csv")


@pytest.mark.parametrize("table", ["truth", "metadata", "artifacts"])
def test_empty_table(folder, table):
    getattr(folder, table).write_text("")
    check(folder, str(getattr(folder, table)), "is empty")


def test_both_diseases(folder):
    folder.edit(folder.truth, "ISIC_0000004,1.0,0.0", "ISIC_0000004,1.0,1.0")
    check(folder, str(folder.truth), "1 image(s) are both MEL and NV: ISIC_0000004")


def test_no_melanoma_and_no_nevus(folder):
    folder.truth.write_text("image,MEL,NV\nISIC_0000000,0.0,0.0\n")
    check(folder, str(folder.truth), "empty of MEL and NV")


def test_duplicate_id_across_the_suffix(folder):
    folder.edit(folder.truth, "ISIC_0000006,", "ISIC_0000005,")
    check(folder, str(folder.truth), "ISIC_0000005 in lines 7, 8")


def test_bad_probability(folder):
    folder.edit(folder.artifacts, "0.95", "1.2")
    check(folder, str(folder.artifacts), "hair of ISIC_0000000 is '1.2' in line 2")


def test_tables_without_overlap(folder):
    folder.artifacts.write_text("image,hair,gel_bubble,ruler,ink\nHAM_1,0,0,0,0\n")
    check(folder, str(folder.truth), str(folder.artifacts), "ISIC_0000000", "HAM_1")


def test_metadata_without_some_images(folder):
    lines = folder.metadata.read_text().splitlines()
    folder.metadata.write_text("\n".join(lines[:-2]))
    check(folder, str(folder.metadata), "2 of 39 images: ISIC_0000038, ISIC_0000039")


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_threshold_out_of_range(folder, threshold):
    check(folder, "threshold must be in [0, 1)", threshold=threshold)
