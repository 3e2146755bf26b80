"""The drawn images show what they are told to, and their folder reads like ISIC 2019."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rl4med_ddpo.datamodules.annotations import read_annotations
from rl4med_ddpo.datamodules.dermoscopy import CLASSES, PREVALENCE, DermoscopyFolder
from rl4med_ddpo.datamodules.drawing import draw
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.foundation.errors import UserError
from support.dermoscopy import ARTIFACTS, ATTRIBUTES, CONDITIONS, condition_of

TABLES = (
    "ISIC_2019_Training_GroundTruth.csv",
    "ISIC_2019_Training_Metadata.csv",
    "isic_inferred_wocarcinoma.csv",
)


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "isic"
    DermoscopyFolder(root, images=300, seed=3, size=32).write()
    return root


@pytest.fixture(scope="module")
def large() -> pd.DataFrame:
    """What 20,000 long-tailed images would show; none is drawn."""
    folder = DermoscopyFolder(Path("never-written"), images=20_000)
    return folder._content(np.random.default_rng(0))


def test_same_seed_same_bytes_for_any_number_of_processes(folder, tmp_path):
    DermoscopyFolder(tmp_path / "two", images=300, seed=3, size=32, workers=2).write()
    assert content(tmp_path / "two") == content(folder)


def test_another_seed_draws_other_images(folder, tmp_path):
    DermoscopyFolder(tmp_path / "other", images=3, seed=4, size=32).write()
    ours = sorted((tmp_path / "other").rglob("*.jpg"))[0]
    assert ours.read_bytes() not in content(folder).values()


def test_tables_have_the_official_form(folder):
    truth, metadata, artifacts = ((folder / name).read_bytes() for name in TABLES)
    assert truth.startswith(b"image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\r\nISIC_0000000")
    assert metadata.startswith(
        b"image,age_approx,anatom_site_general,lesion_id,sex\r\nISIC_0000000"
    )
    assert artifacts.startswith(
        b",image,dark_corner,hair,gel_border,gel_bubble,ruler,ink,patches,vasc,label,label_string\n"
        b"0,ISIC_0000000,0."
    )
    assert b"\r" not in artifacts
    for table in (truth, metadata):
        assert table.count(b"\r\n") == table.count(b"\n") == 301


def test_tables_name_the_images_row_for_row(folder):
    truth, metadata, artifacts = (pd.read_csv(folder / name) for name in TABLES)
    files = sorted(p.stem for p in (folder / "ISIC_2019_Training_Input").glob("*.jpg"))
    assert sorted(truth["image"]) == sorted(metadata["image"]) == files
    assert truth["image"].str.endswith("_downsampled").sum() > 5
    assert artifacts["image"].tolist() == truth["image"].str.removesuffix("_downsampled").tolist()
    assert (truth[list(CLASSES)].sum(axis=1) == 1).all()
    assert ((artifacts["label"] == 1) == (truth["MEL"] == 1)).all()


def test_images_are_square_and_not_subsampled_in_colour(folder):
    with Image.open(next((folder / "ISIC_2019_Training_Input").glob("*.jpg"))) as image:
        assert image.size == (32, 32)
        assert image.mode == "RGB"
        assert all(sampling[1:3] == (1, 1) for sampling in image.layer)


def test_some_lesions_have_two_images_of_one_disease(folder):
    both = pd.read_csv(folder / TABLES[0]).merge(pd.read_csv(folder / TABLES[1]), on="image")
    images = both.groupby("lesion_id")["MEL"].agg(["size", "nunique"])
    assert set(images["size"]) == {1, 2}
    assert (images["nunique"] == 1).all()


def test_the_datamodule_reads_the_folder_with_leakfree_lesions(folder):
    data = ISICDataModule(root=str(folder), split="lesion", size=32, batch_size=8, num_workers=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 32, 32)
    assert batch["condition"].shape == (8, 6)


def test_long_tail_has_the_prevalence_it_promises(large):
    measured = large[list(PREVALENCE)].mean()
    error = 4 * np.sqrt(0.25 / 16_000)
    for name, expected in PREVALENCE.items():
        assert measured[name] == pytest.approx(expected, abs=error)
    assert measured["ink"] < 0.06


def test_balanced_holds_the_32_combinations_alike():
    folder = DermoscopyFolder(Path("never-written"), images=6400, combinations="balanced")
    drawn = folder._content(np.random.default_rng(0))
    counts = drawn[list(ATTRIBUTES)].value_counts()
    assert len(counts) == 32
    assert counts.min() > 140
    assert counts.max() < 260


@pytest.mark.parametrize("recall", [0.0, 0.7, 1.0])
def test_artifacts_are_missed_at_the_rate_asked_for_and_never_invented(tmp_path, recall):
    folder = DermoscopyFolder(tmp_path, images=1500, size=8, label_recall=recall)
    folder.write()
    shown = folder._content(np.random.default_rng([0, 0]))
    labelled = read_annotations(tmp_path).frame[list(ARTIFACTS)].to_numpy().astype(bool)
    present = shown[list(ARTIFACTS)].to_numpy().astype(bool)
    assert not (labelled & ~present).any()
    assert labelled[present].mean() == pytest.approx(recall, abs=0.05)


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_each_artifact_changes_the_picture_where_it_lies_and_nowhere_else(artifact):
    marks = {
        "hair": lambda before, after: after[before - after > 40].size,
        "gel_bubble": lambda before, after: after[after > 225].size - before[before > 225].size,
        "ruler": lambda before, after: after[before - after > 80].size,
        "ink": lambda before, after: after[before - after > 40].size,
    }
    for seed in range(20):
        without, with_it = (
            draw(condition_of("NV", names).tolist(), np.random.default_rng(seed)).astype(int)
            for names in ((), (artifact,))
        )
        changed = np.abs(with_it - without).max(axis=2) > 8
        assert 0.03 < changed.mean() < 0.7
        assert marks[artifact](without, with_it) > 60


def test_ink_alone_turns_skin_blue():
    def bluest(names: tuple[str, ...], seed: int) -> int:
        image = draw(condition_of("NV", names).tolist(), np.random.default_rng(seed)).astype(int)
        return (image[..., 2] - image[..., 0]).max()

    assert all(bluest(("ink",), seed) > 50 for seed in range(20))
    assert all(bluest(("hair", "gel_bubble", "ruler"), seed) < 30 for seed in range(20))


def test_melanoma_has_many_colours_and_a_nevus_few():
    def spread_of_chroma(disease: str) -> float:
        images = [draw(condition_of(disease).tolist(), np.random.default_rng(s)) for s in range(40)]
        middle = np.stack(images).astype(float)[:, 22:42, 22:42]
        return (middle[..., 0] / middle.sum(axis=3)).std(axis=(1, 2)).mean()

    assert spread_of_chroma("MEL") > 2 * spread_of_chroma("NV")


def test_images_of_one_lesion_share_skin_and_lesion():
    first, second = (
        draw(condition.tolist(), np.random.default_rng(seed), 64, np.random.default_rng(9))
        for seed, condition in ((1, CONDITIONS[16]), (2, CONDITIONS[16]))
    )
    assert np.array_equal(first, second)


def test_an_image_of_two_diseases_is_refused():
    with pytest.raises(ValueError, match="one disease"):
        draw([0, 0, 0, 0, 1, 1], np.random.default_rng(0))


@pytest.mark.parametrize("wrong", [{"images": 0}, {"size": 4}, {"seed": -1}, {"label_recall": 1.1}])
def test_values_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        DermoscopyFolder(tmp_path, **({"images": 2} | wrong))


def test_a_folder_with_tables_is_not_written_over(folder):
    with pytest.raises(UserError, match="already holds"):
        DermoscopyFolder(folder, images=2)
