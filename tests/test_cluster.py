"""The cluster examples, run with stand-ins for Slurm's and torch's launchers."""

import os
import subprocess

import pytest
import yaml

from support.command_line import ROOT, in_process

CLUSTER = ROOT / "docs" / "cluster"


def launched(tmp_path, script, exit_code=0, **environment):
    """Run a script; return its exit code, and what it asked each launcher to do."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    for name, code in (("srun", exit_code), ("torchrun", exit_code), ("scontrol", 0)):
        stand_in = tmp_path / name
        stand_in.write_text(
            f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/{name}.args\nexit {code}\n'
        )
        stand_in.chmod(0o755)
    done = subprocess.run(
        ["bash", str(CLUSTER / script)],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment,
        check=False,
    )
    asked = {p.stem: p.read_text().splitlines() for p in tmp_path.glob("*.args")}
    return done.returncode, asked


SLURM = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_ID": "77"}


def parsed(capsys, arguments):
    """What the real command line makes of a launcher's arguments."""
    with pytest.raises(SystemExit):
        in_process(*arguments[arguments.index("run.py") + 1 :], "--print_config")
    return yaml.safe_load(capsys.readouterr().out)["trainer"]


def test_the_job_trains_on_every_node_in_a_folder_of_its_own(tmp_path, capsys):
    code, asked = launched(tmp_path, "ddpo_nodes.sbatch", RUN="runs/seventh", **SLURM)
    assert (code, set(asked)) == (0, {"srun"})
    trainer = parsed(capsys, asked["srun"])
    assert (trainer["num_nodes"], trainer["devices"], trainer["strategy"]) == (2, "4", "ddp")
    assert trainer["default_root_dir"] == "runs/seventh"


@pytest.mark.parametrize(("ended", "requeued"), [(138, True), (143, False), (1, False)])
def test_a_job_that_was_asked_to_leave_is_put_back_and_a_broken_one_is_not(
    tmp_path, ended, requeued
):
    code, asked = launched(tmp_path, "ddpo_nodes.sbatch", exit_code=ended, **SLURM)
    assert asked.get("scontrol") == (["requeue", "77"] if requeued else None)
    assert code == (0 if requeued else ended)


def test_torchrun_starts_one_process_a_gpu(tmp_path, capsys):
    code, asked = launched(tmp_path, "sd_torchrun.sh", GPUS="2", RUN="runs/mine")
    assert code == 0
    assert "--nproc-per-node 2" in " ".join(asked["torchrun"])
    trainer = parsed(capsys, asked["torchrun"])
    assert (trainer["devices"], trainer["default_root_dir"]) == ("2", "runs/mine")


@pytest.mark.parametrize("script", ["ddpo_nodes.sbatch", "sd_torchrun.sh"])
def test_each_line_has_a_comment_before_it(script):
    commands, explained = [], False
    for line in (CLUSTER / script).read_text().splitlines()[1:]:
        if line.startswith("#") and not line.startswith("#SBATCH"):
            explained = True
        elif line.strip() and not line.startswith((" ", "else", "fi")):
            commands.append((line, explained))
        if not line.strip():
            explained = False
    assert len(commands) > 4
    assert [line for line, explained in commands if not explained] == []
