"""The whole experiment at a small size: `make demo`, or as a module with `--help`.

Each stage is a command that you could type, printed as it runs. A stage that has finished is
not run again, an interrupted one resumes where it stopped. Everything lands in one folder,
which the demo's configurations know as the environment variable DEMO.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from PIL import Image
from torch.utils.data import DataLoader

from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.lightning_modules.classifier import load_classifier
from rl4med_ddpo.metrics.apr import as_asked
from rl4med_ddpo.metrics.intervals import wilson_interval
from rl4med_ddpo.report.sheet import beside, save_png

Stage = tuple[str, list[list[str]]]
"""Its name, and the commands that run at the same time."""


def stages(run: Path, seed: int) -> list[Stage]:
    """Name the stages and their commands, in order."""
    seeded = ["--seed_everything", str(seed)]
    fit, test = (["-m", "rl4med_ddpo", stage, "--config"] for stage in ("fit", "test"))
    draw = ["-m", "rl4med_ddpo.datamodules.dermoscopy", "--images", "5000", "--workers", "2"]
    noisy = ["--label_recall", "0.6"]
    balanced = ["--label_recall", "1", "--combinations", "balanced"]
    # small operations gain more from a second process than from a second thread
    twice = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    baseline = ["--model.policy", "null", "--trainer.default_root_dir", str(run / "sd")]
    return [
        ("data", [[*draw, "--seed", str(seed), "--root", str(run / "data"), *noisy]]),
        (
            "balanced",
            [[*draw, "--seed", str(seed + 1000), "--root", f"{run}/balanced", *balanced]],
        ),
        (
            "classifier and judge",
            [
                [*fit, "demo/classifier.yaml", *seeded],
                [*fit, "demo/judge.yaml", "--seed_everything", str(seed + 1000)],
            ],
        ),
        ("sd", [[*fit, "demo/sd.yaml", *seeded, *twice, "--data.batch_size", "32"]]),
        ("ddpo", [[*fit, "demo/ddpo.yaml", *seeded, *twice]]),
        ("score sd", [[*test, "demo/ddpo.yaml", *seeded, *twice, *baseline]]),
        ("score sd_rl", [[*test, "demo/ddpo.yaml", *seeded, *twice]]),
    ]


def demo(seed: int = 0, run: Path = Path("runs/demo")) -> None:
    """Write the data, train every stage, score SD and SD+RL, and say what came of it.

    Args:
        seed: Of the data and of every stage.
        run: Folder of this experiment.
    """
    seconds_file = run / "stages.json"
    seconds = json.loads(seconds_file.read_text()) if seconds_file.exists() else {}
    for name, commands in stages(run, seed):
        if name in seconds:
            print(f"[{name}] finished before, in {seconds[name]:.0f} s")
            continue
        seconds[name] = execute(name, commands, run)
        run.mkdir(parents=True, exist_ok=True)
        seconds_file.write_text(json.dumps(seconds, indent=2) + "\n")
    results = collect(run, seconds)
    (run / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    figure = before_and_after(run)
    print(table(results))
    print(f"\n{results['stopped']}")
    print(f"\nBefore and after, same prompts and noise: {figure}")
    print(f"All numbers: {run / 'results.json'}")
    print(f"Curves and grids: {Path(sys.executable).parent}/tensorboard --logdir {run}")


def execute(name: str, commands: list[list[str]], run: Path) -> float:
    """Run one stage and return its wall seconds; a stage that fails ends the demo.

    Of commands that run at the same time each has one thread; the first has the terminal, the
    others a file each.
    """
    started, running = time.monotonic(), []
    variables = {"DEMO": str(run)} | ({"OMP_NUM_THREADS": "1"} if len(commands) > 1 else {})
    for number, command in enumerate(commands):
        log = run / f"{name} {number + 1}.log".replace(" ", "_") if number else None
        typed = " ".join([*(f"{k}={v}" for k, v in variables.items()), "python"])
        into = f" > {log}" if log else ""
        print(f"\n[{name}] $ {typed} {shlex.join(command)}{into}", flush=True)
        with log.open("w") if log else nullcontext() as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                env=os.environ | variables,
                stdout=output,
                stderr=output and subprocess.STDOUT,
            )
        running.append((process, log))
    failed = [(process.args, log) for process, log in running if process.wait()]
    for command, log in failed:
        why = f" (why: {log})" if log else ""
        print(f"\n[{name}] failed{why}: {shlex.join(command)}", file=sys.stderr)
    if failed:
        sys.exit("To resume: make demo")
    return time.monotonic() - started


def collect(run: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Gather the scores of both models, the ceiling, the reason of the stop, and the times."""
    scores = {
        name: json.loads((run / folder / "results" / "metrics.json").read_text())
        for name, folder in (("sd", "sd"), ("sd_rl", "ddpo"))
    }
    return {**scores, "ceiling": ceiling(run), "stopped": reason_of_stop(run), "seconds": seconds}


@torch.no_grad()
def ceiling(run: Path) -> dict[str, Any]:
    """Score real images as if they were samples: no generator can be read better than these."""
    judge = load_classifier(run / "judge" / "checkpoints" / "best.ckpt", heads="judge")
    real = ISICDataModule(str(run / "balanced"), size=64).dataset("test")
    several = slice(len(judge.vocabulary.any_of))
    right = [
        as_asked(judge(batch["image"])[:, several] > 0, batch["condition"][:, several].bool())
        for batch in DataLoader(real, batch_size=256)
    ]
    correct, n = int(torch.cat(right).sum()), len(real)
    return {"apr": correct / n, "apr_interval": list(wilson_interval(correct, n)), "n": n}


def reason_of_stop(run: Path) -> str:
    """Return the sentence that RewardPlateau or RewardHacking left in the last checkpoint."""
    checkpoint = torch.load(
        run / "ddpo" / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True
    )
    reasons = [s.get("stopping_reason_message") for s in checkpoint["callbacks"].values()]
    return next(filter(None, reasons), None) or (
        f"Stopped after epoch {checkpoint['epoch'] + 1}: trainer.max_epochs, before any plateau."
    )


def table(results: dict[str, Any]) -> str:
    """Lay the scores out side by side."""
    lines = ["", "                 APR      95% interval    images   reward"]
    rows = (("SD", "sd"), ("SD+RL", "sd_rl"), ("real, balanced", "ceiling"))
    for title, name in rows:
        score = results[name]
        low, high = score["apr_interval"]
        reward = f"{score['reward']:.3f}" if "reward" in score else ""
        lines.append(
            f"{title:15}{score['apr']:6.1%}  {low:6.1%} to {high:6.1%}  {score['n']:7}   {reward}"
        )
    seconds = results["seconds"]
    times = ", ".join(f"{name} {taken:.0f} s" for name, taken in seconds.items())
    return "\n".join([*lines, "", f"{sum(seconds.values()) / 60:.1f} minutes: {times}"])


def before_and_after(run: Path) -> Path:
    """Set the two models' grids of the same prompts and noise side by side."""
    grids = [Image.open(run / folder / "grids" / "test.png") for folder in ("sd", "ddpo")]
    path = run / "before_after.png"
    save_png(beside(grids, ("SD", "SD+RL")), path)
    return path


if __name__ == "__main__":
    auto_cli(demo, as_positional=False)
