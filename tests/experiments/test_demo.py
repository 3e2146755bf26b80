import sys

import pytest

from rl4med_ddpo.experiments.demo import execute


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
