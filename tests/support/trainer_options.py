"""Try every option of Lightning's trainer in every stage, and write down what comes of it.

python tests/support/trainer_options.py FOLDER makes tiny runs in the folder, some five hundred of
them, and writes docs/trainer_options.md.
"""

import inspect
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import lightning as L  # noqa: E402
import torch  # noqa: E402

from rl4med_ddpo.base_pipeline.build import build_pipeline  # noqa: E402
from rl4med_ddpo.command_line import run as program  # noqa: E402
from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder  # noqa: E402
from rl4med_ddpo.lightning_modules.pipelines.load import save_pipeline  # noqa: E402
from support.command_line import classifier, ddpo, fine_tuning  # noqa: E402
from support.dermoscopy import ARTIFACTS, ATTRIBUTES  # noqa: E402
from support.forked import call_and_leave  # noqa: E402
from support.tiny import TINY_NETWORKS, fitted  # noqa: E402

FEW = (
    "--data.root=null", "--data.samples_per_epoch=8", "--data.test_samples_per_prompt=2",
    "--model.steps=2", "--model.sample_batch=4", "--data.predict_batch_size=4",
    "--trainer.check_val_every_n_epoch=1",
)  # fmt: skip
TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")
VALUES = {
    "accelerator": ("cpu", "auto", "gpu", "mps", "tpu"),
    "strategy": ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_spawn", "ddp_fork",
                 "ddp_notebook", "fsdp", "deepspeed"),
    "devices": ("auto", "2"),
    "num_nodes": ("1",),
    "precision": ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true",
                  "transformer-engine"),
    "logger": ("true", "false", "CSVLogger"),
    "callbacks": ("null",),
    "fast_dev_run": ("true", "2"),
    "max_epochs": ("2", "0"),
    "min_epochs": ("2",),
    "max_steps": ("4",),
    "min_steps": ("20",),
    "max_time": ("00:00:00:01",),
    "limit_train_batches": ("1", "0.5", "0"),
    "limit_val_batches": ("1", "0"),
    "limit_test_batches": ("1",),
    "limit_predict_batches": ("1",),
    "overfit_batches": ("1", "0.5"),
    "val_check_interval": ("1", "0.5", "100", "00:00:00:01"),
    "check_val_every_n_epoch": ("2", "null"),
    "num_sanity_val_steps": ("1", "-1"),
    "log_every_n_steps": ("1",),
    "enable_checkpointing": ("true", "false"),
    "enable_progress_bar": ("true", "false"),
    "enable_model_summary": ("true", "false"),
    "accumulate_grad_batches": ("2",),
    "gradient_clip_val": ("1.0",),
    "gradient_clip_algorithm": ("value",),
    "deterministic": ("true", "warn"),
    "benchmark": ("true",),
    "inference_mode": ("false",),
    "use_distributed_sampler": ("false",),
    "profiler": ("simple", "advanced", "pytorch"),
    "detect_anomaly": ("true",),
    "barebones": ("true",),
    "plugins": ("LightningEnvironment",),
    "sync_batchnorm": ("true",),
    "reload_dataloaders_every_n_epochs": ("1",),
    "default_root_dir": ("elsewhere",),
    "enable_autolog_hparams": ("false",),
    "model_registry": ("name",),
}  # fmt: skip
"""What each option is tried with. Without the trainer's default this would not be every option."""
FORKING = ("ddp_fork", "ddp_notebook")
ON_TWO = ("strategy", "use_distributed_sampler", "sync_batchnorm")
ENVIRONMENTS = {
    "plain variables": {"LOCAL_RANK": "{rank}", "NODE_RANK": "0", "WORLD_SIZE": "2"},
    "torchrun": {
        "RANK": "{rank}", "LOCAL_RANK": "{rank}", "GROUP_RANK": "0", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_RESTART_COUNT": "0",
    },
    "Slurm": {
        "SLURM_NTASKS": "2", "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}",
        "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "job", "SLURM_NODELIST": "127.0.0.1",
    },
}  # fmt: skip
"""Variables that each launcher gives its two processes."""
PATIENCE = 120
"""Seconds until a run counts as one that waits for ever."""


class Stages:
    """The commands of all stages, on data and networks of their own."""

    def __init__(self, folder):
        self.folder = folder
        save_pipeline(build_pipeline(**TINY_NETWORKS), folder / "pipeline")
        networks = {
            "reward": fitted(folder / "reward.ckpt", "test_efficientnet", ATTRIBUTES, seed=1),
            "judge": fitted(folder / "judge.ckpt", "test_resnet", ARTIFACTS, seed=2),
        }
        DermoscopyFolder(folder / "isic", images=64, size=16, combinations="balanced").write()
        pipeline, isic = folder / "pipeline", folder / "isic"
        one_pass = ("--model=OnePassDDPO", "--model.updates=1")
        self.fits = {
            "classifier": lambda run: classifier(run, isic),
            "SD": lambda run: fine_tuning(run, pipeline, isic),
            "DDPO": lambda run: ddpo(run, pipeline, networks, *FEW),
            "OnePassDDPO": lambda run: ddpo(run, pipeline, networks, *FEW, *one_pass),
        }
        self.names = [f"fit {name}" for name in self.fits]
        self.names += ["test classifier", "test DDPO", "predict DDPO"]

    def prepare(self):
        for name in ("classifier", "DDPO"):
            code = self.ended(self.of(f"fit {name}", self.folder / f"made {name}"), "prepare", {})
            assert code == 0, (self.folder / "prepare.log").read_text()

    def of(self, stage, run):
        subcommand, _, name = stage.partition(" ")
        made = self.folder / f"made {name}"
        if subcommand != "fit":
            shutil.copytree(made, run, symlinks=True)
        end = ("--trainer.max_epochs=1",) if subcommand == "fit" else ()
        return [subcommand, *self.fits[name](run)[1:], *end]

    def ended(self, args, log, variables, fresh=False):
        """Give a command to a process of its own; return its exit code, None if it does not end.

        Args:
            args: The command.
            log: Name of the file for what it says.
            variables: Of its environment.
            fresh: Start it anew, which takes seconds longer: a forked process may not fork.
        """
        if fresh:
            with (self.folder / f"{log}.log").open("w") as file:
                program = [sys.executable, str(ROOT / "run.py"), *map(str, args)]
                return subprocess.run(program, stdout=file, stderr=file, check=False).returncode
        child = os.fork()
        if not child:
            _become(args, self.folder / f"{log}.log", variables)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.killpg(child, 9)
        os.waitpid(child, 0)
        return None

    def tried(self, stage, option, value):
        """Return what came of an option: `works`, or the words of the refusal."""
        label = re.sub(r"[^\w.-]+", "_", f"{stage} {option} {value}")
        args = self.of(stage, self.folder / label)
        if option in ("max_epochs", "min_epochs", "max_steps", "min_steps"):
            args = [a for a in args if not a.startswith("--trainer.max_epochs")]
            args += ["--trainer.max_epochs=3"] * option.startswith("min")
            args += ["--trainer.max_epochs=-1"] * (option == "max_steps")
        args += TWO if option in ON_TWO else ()
        if option == "default_root_dir":
            value = f"{value} {label}"
            if (run := self.folder / label).exists():
                run.rename(value)
        args = [*args, f"--trainer.{option}={value}"]
        return self.said(label, self.ended(args, label, {}, fresh=value in FORKING))

    def launched(self, stage, environment):
        """Return what came of two processes that a launcher of this kind has started."""
        label = re.sub(r"\W+", "_", f"{stage} {environment}")
        args = [*self.of(stage, self.folder / label), *TWO]
        port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + hash(label) % 20000)}
        with ThreadPoolExecutor(2) as pool:
            codes = list(
                pool.map(
                    lambda rank: self.ended(
                        args, f"{label}_{rank}",
                        {k: v.format(rank=rank) for k, v in ENVIRONMENTS[environment].items()}
                        | port,
                    ),
                    (0, 1),
                )
            )  # fmt: skip
        return "works" if codes == [0, 0] else self.said(f"{label}_0", codes[0])

    def said(self, label, code):
        text = (self.folder / f"{label}.log").read_text(errors="replace")
        if code == 0 and "Traceback" not in text:
            return "works"
        if code == 2 and "Traceback" not in text:
            return text[text.rindex("error: ") + 7 :].strip().replace("\n", " ")
        return f"FAILS ({code})"


def _become(args, log, variables):
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= variables
    if rank := variables.get("LOCAL_RANK") or variables.get("SLURM_LOCALID"):
        L.pytorch.utilities.rank_zero_only.rank = int(rank)
    sys.argv = [str(ROOT / "run.py"), *map(str, args)]
    call_and_leave(program, ())


def page(stages, rows):
    """Lay out the table; a refusal is a number, whose words stand below."""
    words = {}
    lines = [
        "# The trainer's options, stage by stage",
        "",
        f"Every option of the trainer of Lightning {L.__version__} and every launcher, tried with",
        "the real command line at a tiny size, on a machine without a GPU, by",
        "`python tests/support/trainer_options.py FOLDER`. A number is a refusal before any work:",
        "exit code 2, in the words below the table.",
        "",
        f"| option | {' | '.join(stages)} |",
        f"|{' --- |' * (len(stages) + 1)}",
    ]
    for name, found in rows:
        cells = [
            said if said == "works" or said.startswith("FAILS")
            else str(words.setdefault(said, len(words) + 1))
            for said in found
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## Words", "", *(f"{number}. {text}" for text, number in words.items()), ""]
    return "\n".join(lines)


def main(folder):
    missing = set(inspect.signature(L.Trainer).parameters) - set(VALUES)
    assert not missing, f"not tried: {missing}"
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    stages = Stages(folder)
    stages.prepare()
    with ThreadPoolExecutor(2) as pool:
        tried = {
            f"`{option}: {value}`": [
                pool.submit(stages.tried, stage, option, value) for stage in stages.names
            ]
            for option, values in VALUES.items()
            for value in values
        }
        rows = []
        for name, cells in tried.items():
            rows.append((name, [cell.result() for cell in cells]))
            print(name, *(said[:40] for said in rows[-1][1]), sep=" | ", flush=True)
    for environment in ENVIRONMENTS:
        rows.append((environment, [stages.launched(stage, environment) for stage in stages.names]))
        print(*rows[-1], flush=True)
    (ROOT / "docs" / "trainer_options.md").write_text(page(stages.names, rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
