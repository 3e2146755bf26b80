import sys

import pytest
import yaml
from jsonargparse import ArgumentParser

from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder
from rl4med_ddpo.experiments.demo import execute, stages
from support.command_line import in_process


def test_a_stage_that_fails_says_where_its_output_is(tmp_path, capfd):
    failing = ["-c", "import sys; print('the cause'); sys.exit(3)"]
    with pytest.raises(SystemExit, match="To resume: make demo"):
        execute("two at once", [["-c", "pass"], failing], tmp_path)
    log = tmp_path / "two_at_once_2.log"
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
