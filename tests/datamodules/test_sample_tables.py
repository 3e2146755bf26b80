import csv

import pytest

from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.datamodules.sample_tables import write_tables
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.foundation.files import write_whole
from support.dermoscopy import ATTRIBUTES, CONDITIONS


def rows(n):
    return [
        {"id": f"sample_{i:02d}", **dict(zip(ATTRIBUTES, map(int, CONDITIONS[i]), strict=True))}
        for i in range(n)
    ]


def test_the_tables_have_the_official_columns_and_line_endings(tmp_path):
    write_tables(tmp_path, rows(32), DERMOSCOPY)
    truth = (tmp_path / "ISIC_2019_Training_GroundTruth.csv").read_bytes()
    assert truth.startswith(b"image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\r\n")
    assert truth.count(b"\r\n") == truth.count(b"\n") == 33
    assert b"\r\nsample_31,0.0,1.0,0.0" in truth
    metadata = (tmp_path / "ISIC_2019_Training_Metadata.csv").read_bytes()
    assert metadata.startswith(b"image,age_approx,anatom_site_general,lesion_id,sex\r\n")
    assert b"\r\nsample_07,,,,\r\n" in metadata


def test_the_tables_say_what_was_asked_for(tmp_path):
    write_tables(tmp_path, rows(32), DERMOSCOPY)
    frame = ISICDataModule(str(tmp_path)).annotations.frame
    assert frame["id"].tolist() == [row["id"] for row in rows(32)]
    assert frame[list(ATTRIBUTES)].to_numpy().tolist() == CONDITIONS.int().tolist()
    assert (frame["lesion_id"] == "").all()
    with (tmp_path / "manifest.csv").open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == frame["id"].tolist()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new and longer")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_whole(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
