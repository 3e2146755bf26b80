"""Compare ways of learning on the demo's stages: what each buys, and what it costs.

    python -m benchmarks.learning --method draft_kl --seed 0 --images 2560 --demo runs/demo

Needs the classifier, judge and SD of `make demo`, of the same seed. Prints one JSON object. Killed
and started again it goes on; what has finished is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5)
EPOCH = 512
"""Images between two points of a curve, and in a rollout."""

# everything that the methods differ in, so that they do not depend on what the demo ships
DDPO = {
    "train": "full", "guidance": 3.0, "updates": 1, "timestep_window": "null",
    "rollout_noise": "all", "step_weights": "none", "trust_region": "clip", "kl_weight": 0.0,
    "training_steps": "null", "baseline": "group", "reward": "AttributeMatch",
    "reward.init_args.classifier": "{demo}/classifier/checkpoints/best.ckpt",
    "optimizer": "torch.optim.AdamW", "optimizer.init_args.lr": 1e-4,
    "optimizer.init_args.weight_decay": 1e-4,
}  # fmt: skip
DRAFT = {
    "train": "full", "guidance": 3.0, "updates": 8, "last_steps": "null", "penalty": 0.0,
    "optimizer": "torch.optim.AdamW", "optimizer.init_args.lr": 5e-5,
    "optimizer.init_args.weight_decay": 1e-4,
}  # fmt: skip
WINDOW = {"timestep_window": "[0, 4]", "rollout_noise": "window"}

SAME, POLICY, SAMPLER = (
    "same estimator",
    "other estimator, same policy",
    "other policy in training",
)


class Method(NamedTuple):
    """How a model is trained.

    Attributes:
        label: What it may be compared by; see `docs/why_rl.md`.
        configuration: Shipped file that it starts from.
        options: Of the model, by name; `class_path` is the model's.
    """

    label: str
    configuration: str
    options: dict[str, Any]


METHODS = {
    "sd": Method(SAME, "demo/ddpo.yaml", {"guidance": 3.0}),
    "paper": Method(SAME, "demo/ddpo.yaml", DDPO),
    "weights": Method(POLICY, "demo/ddpo.yaml", DDPO | {"step_weights": "equal"}),
    "window": Method(SAMPLER, "demo/ddpo.yaml", DDPO | WINDOW),
    "kl": Method(SAMPLER, "demo/ddpo.yaml", DDPO | WINDOW | {"kl_weight": 0.1}),
    "kl4": Method(
        SAMPLER,
        "demo/ddpo.yaml",
        DDPO | WINDOW | {"updates": 4, "trust_region": "kl", "max_kl": 1e-4},
    ),
    "clip4": Method(SAMPLER, "demo/ddpo.yaml", DDPO | WINDOW | {"updates": 4}),
    "few_steps": Method(
        SAMPLER, "demo/ddpo.yaml", DDPO | {"training_steps": 4, "step_weights": "equal"}
    ),
    "one_pass": Method(
        SAME,
        "demo/ddpo.yaml",
        DDPO | {"class_path": "OnePassDDPO", "train": "lora", "optimizer.init_args.lr": 3e-4},
    ),
    "draft": Method(SAMPLER, "demo/draft.yaml", DRAFT),
    "draft_kl": Method(SAMPLER, "demo/draft.yaml", DRAFT | {"penalty": 5.0}),
    "shipped": Method(SAMPLER, "demo/ddpo.yaml", {}),
}


def command(method: Method, subcommand: str, run: Path, demo: Path, seed: int) -> list[str]:
    """Return the command line of one stage of a method."""
    chosen = dict(method.options)
    kind = chosen.pop("class_path", None)
    own = [["--model", kind]] if kind else []
    own += [[f"--model.{k}", str(v).format(demo=demo)] for k, v in chosen.items()]
    return [
        sys.executable, "-m", "rl4med_ddpo", subcommand, "--config", method.configuration,
        "--config", str(Path(__file__).with_suffix(".yaml")), "--seed_everything", str(seed),
        *(word for option in own for word in option),
        "--trainer.default_root_dir", str(run), "--trainer.enable_progress_bar", "false",
        "--data.validation_samples_per_prompt", "8", "--data.root", "null",
    ]  # fmt: skip


def measure(
    name: str, seed: int, images: int, demo: Path, run: Path, more: list[str], per_prompt: int
) -> dict[str, Any]:
    """Train by a method, score it over guidance, and sum both up.

    Args:
        name: Of the method.
        seed: Of the training.
        images: That it draws to train on.
        demo: Folder of the demo's stages.
        run: Folder of this training.
        more: Further options of `fit` and `test`.
        per_prompt: Images of each prompt at a guidance.
    """
    method = METHODS[name]
    epochs = max(1, round(images / EPOCH))
    if name != "sd":
        execute(
            [
                *command(method, "fit", run, demo, seed),
                *("--data.samples_per_epoch", str(EPOCH), "--trainer.max_epochs", str(epochs)),
                *("--trainer.check_val_every_n_epoch", "1", *more),
            ],
            run,
            demo,
        )
        weights = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    else:
        weights = ["--model.policy", "null"]
    execute(
        [
            *command(method, "test", run, demo, seed),
            *("--data.test_samples_per_prompt", "1", *weights),
            *("--frontier.guidances", str(list(GUIDANCES))),
            *("--frontier.samples_per_prompt", str(per_prompt)),
            *("--frontier.real", str(demo / "balanced"), *more),
        ],
        run,
        demo,
    )
    named = " ".join([name, *(option.removeprefix("--model.") for option in more)])
    return {"method": named, "seed": seed, "label": method.label, **summary(run)}


def summary(run: Path) -> dict[str, Any]:
    """Return the curve and the scores over guidance that a run left."""
    curve = run / "learning.json"
    frontier = json.loads((run / "results" / "frontier.json").read_text())
    return {
        "guidance": frontier["guidance"],
        **(json.loads(curve.read_text()) if curve.exists() else {}),
        "frontier": [
            {
                "guidance": point["guidance"],
                "apr": point["apr"],
                "apr_interval": point["apr_interval"],
                "val_apr": point["val_apr"],
                "diversity_right": point["diversity_right"]["value"],
                "distance": point["distance"]["value"],
                "worst_prompt": min(point["prompts"].values()),
                "prompts": point["prompts"],
            }
            for point in frontier["points"]
        ],
        "best_guidance": frontier["best_guidance"],
    }


def execute(command: list[str], run: Path, demo: Path) -> None:
    """Run one stage; what it says goes to a file, which is named if it fails."""
    run.mkdir(parents=True, exist_ok=True)
    log = run / "log.txt"
    with log.open("a") as output:
        print("$", " ".join(command), file=output, flush=True)
        variables = {"DEMO": str(demo), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, env=os.environ | variables, stdout=output, stderr=output, check=False
        )
    if done.returncode:
        sys.exit(f"failed, see {log}: {' '.join(command)}")


def main() -> None:
    """Print one JSON object for the command line's options."""
    parser = argparse.ArgumentParser(
        description="Measure what a way of learning buys and costs, on the demo's stages.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--method", choices=METHODS, required=True, help="how to learn")
    add("--seed", type=int, default=0, help="of the training")
    add("--images", type=int, default=2560, help="drawn to train on")
    add("--demo", type=Path, default=Path("runs/demo"), help="folder of the demo's stages")
    add("--run", type=Path, help="folder of this training; default: learning/METHOD_SEED in demo")
    add("--per-prompt", type=int, default=64, help="images of each prompt at a guidance")
    add("--option", action="append", default=[], help="one more of fit and test, as KEY=VALUE")
    given = parser.parse_args()
    run = given.run or given.demo / "learning" / f"{given.method}_{given.seed}"
    more = [word for option in given.option for word in (f"--{option}",)]
    result = measure(
        given.method, given.seed, given.images, given.demo, run, more, given.per_prompt
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
