"""Table 4: train the classifier on real and on augmented data, with several seeds.

    python -m rl4med_ddpo.experiments.table_4 --classifier classifier.yaml --run runs

Each arm and seed is a command that you could type, printed as it runs; one that has finished is not
run again. What it leaves, `python run.py report` turns into the table.
"""

import json
import multiprocessing
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from jsonargparse import auto_cli

from rl4med_ddpo.foundation.errors import UserError

ARMS = ("real", "oversampling", "classical", "sd", "sd_rl")


def commands(
    arm: str, seed: int, run: Path, classifier: str, per_subgroup: int, options: list[str]
) -> list[list[str]]:
    """Return the command that trains an arm with a seed, and the one that tests it."""
    folder = run / "table4" / arm / f"seed_{seed}"
    sources = {
        "real": None,
        "oversampling": "train",
        "classical": "train",
        "sd": str(run / "sd" / "samples"),
        "sd_rl": str(run / "ddpo" / "samples"),
    }
    common = [
        "--config", classifier, "--seed_everything", str(seed),
        "--trainer.default_root_dir", str(folder),
        "--trainer.callbacks.arm", arm,
        *options,
    ]  # fmt: skip
    if sources[arm] is not None:
        extra = {"source": sources[arm], "per_subgroup": per_subgroup}
        common += ["--data.extra", json.dumps(extra)]
    # flips come with every arm; blur, tint and grain are what else is classical
    common += ["--data.distort", str(arm == "classical").lower()]
    best = str(folder / "checkpoints" / "best.ckpt")
    return [["fit", *common], ["test", *common, "--ckpt_path", best]]


def train_and_test(lines: list[list[str]]) -> None:
    """Run the commands one after the other in this process."""
    from rl4med_ddpo.command_line import main

    for line in lines:
        print(f"$ python run.py {shlex.join(line)}", flush=True)
        main(line)


def table_4(
    classifier: str = "classifier.yaml",
    run: Path = Path("runs"),
    per_subgroup: int = 60,
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - read only
    workers: int = 1,
    options: list[str] = [],  # noqa: B006 - read only
) -> None:
    """Train and test every arm with every seed.

    Args:
        classifier: Its configuration.
        run: Folder that holds the runs of SD (`sd`) and SD+RL (`ddpo`) with their samples; the arms
            go to `table4` in it.
        per_subgroup: Images added for each of the 32 subgroups, in each arm but the real one.
        seeds: At least three, for the interval knows the luck of training by them.
        workers: Arms trained at a time; more than one on a CPU only.
        options: Further options of run.py, the same for every arm; `data.distort` is the
            classical arm's.
    """
    if len(set(seeds)) < 3:
        raise UserError(f"Table 4 needs at least three different seeds, given are {seeds}.")
    todo = [
        commands(arm, seed, run, classifier, per_subgroup, options)
        for seed in seeds
        for arm in ARMS
        if not (run / "table4" / arm / f"seed_{seed}" / "results" / "metrics.json").exists()
    ]
    if workers == 1:
        for lines in todo:
            train_and_test(lines)
        return
    # forked, for a fresh process spends longer on imports than a small classifier on an epoch
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork, max_tasks_per_child=None) as pool:
        for finished in [pool.submit(train_and_test, lines) for lines in todo]:
            finished.result()


if __name__ == "__main__":
    try:
        auto_cli(table_4, as_positional=False)
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)
