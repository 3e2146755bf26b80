import sys

import pytest
import yaml
from jsonargparse import ArgumentParser
from PIL import Image

from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder
from rl4med_ddpo.experiments import first_look as looking
from rl4med_ddpo.experiments.demo import execute, rows_of, stages
from rl4med_ddpo.report.sheet import in_rows
from support.command_line import in_process


def test_a_stage_that_fails_says_where_its_output_is(tmp_path, capfd):
    failing = ["-c", "import sys; print('the cause'); sys.exit(3)"]
    with pytest.raises(SystemExit, match="To resume: make demo"):
        execute("two at once", [["-c", "pass"], failing], tmp_path / "new")
    log = tmp_path / "new" / "two_at_once_2.log"
    said = capfd.readouterr()
    assert f"failed (why: {log}): {sys.executable} -c" in said.err
    assert "\nthe cause\n" not in said.out
    assert log.read_text() == "the cause\n"


def test_commands_of_one_stage_run_at_the_same_time_with_a_thread_each(tmp_path, capfd):
    """Each waits for the other's file."""
    waiting = (
        "import os, pathlib, sys, time; assert os.environ['OMP_NUM_THREADS'] == '1';"
        "here = pathlib.Path(os.environ['DEMO']); (here / sys.argv[1]).touch();"
        "until = time.monotonic() + 20\n"
        "while not (here / sys.argv[2]).exists(): assert time.monotonic() < until"
    )
    execute("both", [["-c", waiting, "a", "b"], ["-c", waiting, "b", "a"]], tmp_path)
    assert f"DEMO={tmp_path} OMP_NUM_THREADS=1 python -c" in capfd.readouterr().out


def test_every_command_of_the_demo_is_understood(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DEMO", str(tmp_path))
    drawn = ArgumentParser()
    drawn.add_class_arguments(DermoscopyFolder)
    commands = [command for _, several in stages(tmp_path, seed=3) for command in several]
    seeds = []
    for module, name, *args in commands:
        assert module == "-m"
        if name.endswith("dermoscopy"):
            seeds.append(drawn.parse_args(args).seed)
            continue
        with pytest.raises(SystemExit) as end:
            in_process(*args, "--print_config")
        assert not end.value.code
        seeds.append(yaml.safe_load(capsys.readouterr().out)["seed_everything"])
    assert seeds == [3, 1003, 3, 1003, 3, 3, 3, 3, 3, 3]


def test_the_first_look_sets_labelled_images_beside_drawn_ones(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch
):
    monkeypatch.setattr(looking, "IMAGES_PER_PROMPT", 1)
    DermoscopyFolder(tmp_path / "data", images=600, size=16, combinations="balanced").write()
    seen = {}

    def sheet_of(panels, columns):
        seen[len(seen)] = [panel.caption for panel in panels]
        return in_rows(panels, columns)

    monkeypatch.setattr(looking, "in_rows", sheet_of)
    path = tmp_path / "look.png"
    looking.first_look(tiny_pipeline, tmp_path / "data", tiny_classifiers["reward"], path)
    with Image.open(path) as drawn:
        assert drawn.width > 2 * 2 * 128
    for captions in seen.values():
        asked = [text.partition(", read as")[0] for text in captions]
        assert asked[:3] == ["MEL: no artifacts", "NV: no artifacts", "MEL: hair"]
        assert len(set(asked)) == 12
    assert any(", read as " in text for text in seen[1])


def test_the_table_has_sd_at_its_best_guidance_and_all_at_that_of_training():
    def over(best, **aprs):
        points = [{"guidance": float(w[1:]), "apr": apr} for w, apr in aprs.items()]
        return {"guidance": 3.0, "best_guidance": best, "points": points}

    found = {"sd": over(7.0, w3=0.8, w7=0.9), "ddpo": over(3.0, w3=0.95), "draft": over(3.0, w3=1)}
    assert [(row["model"], row["guidance"], row["apr"]) for row in rows_of(found)] == [
        ("SD, its best guidance", 7.0, 0.9), ("SD", 3.0, 0.8), ("SD+RL", 3.0, 0.95),
        ("SD+DRaFT", 3.0, 1),
    ]  # fmt: skip
