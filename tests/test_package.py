"""What pip installs: one import name, a command, the configurations and the embedded pipeline."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from rl4med_ddpo import __version__
from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this repository, built from a copy: a build leaves folders behind."""
    copy = tmp_path_factory.mktemp("source") / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info"))
    made = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", made, copy], check=True)
    return next(made.glob("*.whl"))


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """The console script of a fresh environment; only what the wheel requires comes from here."""
    fresh = tmp_path_factory.mktemp("fresh")
    venv.create(fresh, with_pip=False)
    packages = next(fresh.glob("lib/python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--python", fresh / "bin" / "python"]
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, *install, wheel], check=True)
    # a path in a .pth file brings packages, but not the editable install of this repository
    (packages / "requirements.pth").write_text("\n".join(site.getsitepackages()))
    return fresh / "bin" / "rl4med-ddpo"


def run(command, folder, *arguments):
    folder.mkdir(exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DEMO")}
    return subprocess.run(
        [command, *arguments],
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_the_wheel_has_one_import_name_and_all_that_a_run_needs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "rl4med_ddpo",
        f"rl4med_ddpo-{__version__}.dist-info",
    }
    shipped = {name for name in names if name.startswith("rl4med_ddpo/")}
    for room in ("configs", "assets"):
        files = {p.relative_to(ROOT) for p in (ROOT / room).rglob("*") if p.is_file()}
        assert {f"rl4med_ddpo/{file}" for file in files} <= shipped
    modules = {
        f"rl4med_ddpo/{module.relative_to(ROOT)}"
        for package in ROOT.rglob("__init__.py")
        for module in package.parent.glob("*.py")
        if not {"tests", "benchmarks"} & set(module.parts) and ".venv" not in module.parts
    }
    assert modules - {"rl4med_ddpo/run.py"} <= shipped


def test_an_installed_command_describes_and_trains_in_an_empty_folder(command, tmp_path):
    data = tmp_path / "data"
    DermoscopyFolder(data, images=64, size=64).write()
    said = run(
        command, tmp_path / "work", "describe", "--config=demo/sd.yaml", f"--data.root={data}"
    )
    assert "64 melanomas and nevi, split: paper" in said.stdout, said.stderr
    said = run(
        *(command, tmp_path / "work", "fit", "--config=demo/sd.yaml", f"--data.root={data}"),
        *("--model.steps=2", "--data.batch_size=8", "--trainer.max_epochs=1"),
        "--trainer.limit_val_batches=1",
    )
    assert said.returncode == 0, said.stderr
    log = said.stdout + said.stderr
    assert "epoch 1 done, train/loss" in log
    for misplaced in ("\r", "litlogger", "Tip:"):
        assert misplaced not in log
    unet = Path("work/runs/demo/sd/pipeline/unet/diffusion_pytorch_model.safetensors")
    assert (tmp_path / unet).is_file()
