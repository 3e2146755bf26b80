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
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch.utils.data import DataLoader

from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.experiments.first_look import first_look
from rl4med_ddpo.lightning_modules.classifier import load_classifier
from rl4med_ddpo.metrics.apr import as_asked
from rl4med_ddpo.metrics.intervals import wilson_interval
from rl4med_ddpo.report.pictures import same_seed_figure
from rl4med_ddpo.report.results import FRONTIER, METRICS
from rl4med_ddpo.report.runs import find_runs

CLASSIFIERS = "classifier and judge"
MODELS = {"sd": "SD", "ddpo": "SD+RL", "draft": "SD+DRaFT"}
"""Run folders of what is scored, and what the tables call it."""
Stage = tuple[str, list[list[str]]]
"""Its name, and the commands that run at the same time."""


def stages(run: Path, seed: int) -> list[Stage]:
    """Name the stages and their commands, in order."""
    seeded = ["--seed_everything", str(seed)]
    fit, test = (["-m", "rl4med_ddpo", stage, "--config"] for stage in ("fit", "test"))
    draw = ["-m", "rl4med_ddpo.datamodules.dermoscopy", "--images"]
    noisy = ["--label_recall", "0.6"]
    balanced = ["--label_recall", "1", "--combinations", "balanced"]
    scored = ["--frontier.real", f"{run}/balanced", "--frontier.guidances"]
    baseline = ["--model.policy", "null", "--trainer.default_root_dir", str(run / "sd")]
    return [
        (
            "images",
            [
                [*draw, "4000", "--seed", str(seed), "--root", str(run / "data"), *noisy],
                [*draw, "4000", "--seed", str(seed + 1000), "--root", f"{run}/balanced", *balanced],
            ],
        ),
        (
            CLASSIFIERS,
            [
                [*fit, "demo/classifier.yaml", *seeded],
                [*fit, "demo/judge.yaml", "--seed_everything", str(seed + 1000)],
            ],
        ),
        ("sd", [[*fit, "demo/sd.yaml", *seeded]]),
        (
            "ddpo and draft",
            [[*fit, f"demo/{name}.yaml", *seeded] for name in ("ddpo", "draft")],
        ),
        (
            "scores",
            [
                [*test, "demo/ddpo.yaml", *seeded, *scored, "[3, 5, 7.5]", *baseline],
                [*test, "demo/ddpo.yaml", *seeded, *scored, "[3]"],
                [*test, "demo/draft.yaml", *seeded, *scored, "[3]"],
            ],
        ),
    ]


def demo(seed: int = 0, run: Path = Path("runs/demo")) -> None:
    """Write the data, train every stage, score what came of it beside SD, and say so.

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
        seconds_file.write_text(json.dumps(seconds, indent=2) + "\n")
        if name == CLASSIFIERS:
            print(
                f"\nReal images, those of the base pipeline, and what is read in them: {look(run)}"
            )
    results = collect(run, seconds)
    (run / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    figure = run / "before_after.png"
    same_seed_figure(find_runs([run]), figure, per_prompt=2)
    print(table(results))
    for model, why in results["stopped"].items():
        print(f"\n{MODELS[model]}: {why}")
    print(f"\nBefore and after, same prompts and noise: {figure}")
    print(f"All numbers: {run / 'results.json'}")
    print(f"Curves and grids: {Path(sys.executable).parent}/tensorboard --logdir {run}")


def execute(name: str, commands: list[list[str]], run: Path) -> float:
    """Run one stage and return its wall seconds; a stage that fails ends the demo.

    Each command has one thread, for sums round by the number of threads. Of those that run at the
    same time the first has the terminal, the others a file each.
    """
    run.mkdir(parents=True, exist_ok=True)
    started, running = time.monotonic(), []
    variables = {"DEMO": str(run), "OMP_NUM_THREADS": "1"}
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


def look(run: Path) -> Path:
    """Draw the first picture, unless it is there."""
    path = run / "first_look.png"
    if not path.exists():
        classifier = run / "classifier" / "checkpoints" / "best.ckpt"
        first_look("assets/base", run / "balanced", classifier, path)
    return path


def collect(run: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Gather the scores of all models and of real images, why training stopped, and the times."""
    scores, over_guidance = (
        {name: json.loads((run / name / "results" / file).read_text()) for name in MODELS}
        for file in (METRICS, FRONTIER)
    )
    return {
        **scores,
        "rows": list(rows_of(over_guidance)),
        "real": real_scores(run) | over_guidance["sd"]["real"],
        "stopped": {name: reason_of_stop(run / name) for name in MODELS if name != "sd"},
        "seconds": seconds,
    }


def rows_of(over_guidance: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the scores of SD at its best guidance, and those of each model at that of training.

    Args:
        over_guidance: What `callbacks.Frontier` measured, by run folder.
    """
    for name, title in MODELS.items():
        found = over_guidance[name]
        by_guidance = {point["guidance"]: point for point in found["points"]}
        if name == "sd":
            yield {"model": f"{title}, its best guidance", **by_guidance[found["best_guidance"]]}
        yield {"model": title, **by_guidance[found["guidance"]]}


@torch.no_grad()
def real_scores(run: Path) -> dict[str, Any]:
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


def reason_of_stop(folder: Path) -> str:
    """Return the sentence that RewardPlateau or RewardHacking left in a run's last checkpoint."""
    checkpoint = torch.load(
        folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True
    )
    reasons = [s.get("stopping_reason_message") for s in checkpoint["callbacks"].values()]
    return next(filter(None, reasons), None) or (
        f"Stopped after epoch {checkpoint['epoch'] + 1}: trainer.max_epochs, before any plateau."
    )


def table(results: dict[str, Any]) -> str:
    """Lay the scores out side by side."""
    heads = ("", "guidance", "APR", "95% interval", "diversity", "distance", "worst prompt")
    cells: list[tuple[str, ...]] = [heads]
    for row in results["rows"]:
        (worst, apr), *_ = row["worst_prompts"].items()
        distance = f"{row['distance']['value']:.3f}"
        cells.append(
            (row["model"], f"{row['guidance']:g}", *_alignment(row), distance, f"{apr:.0%} {worst}")
        )
    cells.append(("real, balanced", "", *_alignment(results["real"]), "", ""))
    widths = (22, 10, 7, 16, 11, 10)
    lines = [
        "",
        *("".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=False)) + line[-1]
          for line in cells),
    ]  # fmt: skip
    seconds = results["seconds"]
    times = ", ".join(f"{name} {taken:.0f} s" for name, taken in seconds.items())
    return "\n".join([*lines, "", f"{sum(seconds.values()) / 60:.1f} minutes: {times}"])


def _alignment(scores: dict[str, Any]) -> tuple[str, str, str]:
    low, high = scores["apr_interval"]
    diverse = f"{scores['diversity_right']['value']:.2f}"
    return f"{scores['apr']:.1%}", f"{low:.1%} to {high:.1%}", diverse


if __name__ == "__main__":
    auto_cli(demo, as_positional=False)
