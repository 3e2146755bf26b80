"""The report from results on disk, written here by hand as `test` would leave them."""

import json
import re
import shutil
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_f1_score,
)

from rl4med_ddpo.command_line import main
from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.datamodules.provenance import data_counts, data_provenance
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.metrics.alignment import alignment, exact, readings
from rl4med_ddpo.metrics.leak_matrix import leak_matrix
from rl4med_ddpo.metrics.real_images import real_rates
from rl4med_ddpo.report.cells import percent
from rl4med_ddpo.report.changes import changes_paragraph
from rl4med_ddpo.report.figures import frontier_figure
from rl4med_ddpo.report.report import markdown
from rl4med_ddpo.report.runs import find_runs
from rl4med_ddpo.report.tables import frontier_table, quality_table
from support.dermoscopy import (
    ARTIFACTS,
    ATTRIBUTES,
    CONDITIONS,
    PROMPTS,
    short_name,
)

N = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("isic") / "data"
    DermoscopyFolder(root, images=96, size=16, combinations="balanced").write()
    return ISICDataModule(str(root), size=16)


def manifest(seed, skill):
    """Samples of each prompt, each attribute read as asked with probability `skill`."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(N * 32):
        condition = CONDITIONS[index % 32].int().tolist()
        row = {"id": f"{short_name(CONDITIONS[index % 32]).replace('+', '_')}_{index:06d}"}
        row |= {"prompt": PROMPTS[index % 32], **dict(zip(ATTRIBUTES, condition, strict=True))}
        row |= {"index": index, "noise_key": index * 7, "reward": rng.random()}
        for reader, attributes in (("judge", ARTIFACTS), ("reward", ATTRIBUTES)):
            for a in attributes:
                right = rng.random() < skill
                row[f"{reader}_{a}"] = 0.9 if bool(row[a]) == right else 0.1
        rows.append(row)
    return pd.DataFrame(rows)


def write_samples(run, model, table, data, **provenance):
    folder = run / "samples"
    (folder / "ISIC_2019_Training_Input").mkdir(parents=True)
    for name in table["id"]:
        grey = Image.new("RGB", (16, 16), (90, 60, 120))
        grey.save(folder / "ISIC_2019_Training_Input" / f"{name}.png")
    table.to_csv(folder / "manifest.csv", index=False)
    test = data.splits.test
    results = {
        "kind": "samples", "vocabulary": asdict(DERMOSCOPY), "model": model,
        **alignment(table, DERMOSCOPY),
        "unavailable": {"fid": "no Inception weights here: fetch it"},
        "provenance": {
            "sampler": {"seed": 0, "digest of unet": model}, "samples": len(table),
            "samples_folder": str(folder), "data": data_provenance(data), "policy": model,
            "judge": {"sha256": "aa"}, **provenance,
        },
        "real": real_rates(test, DERMOSCOPY, test[list(ARTIFACTS)].to_numpy() == 1),
        "counts": data_counts(data),
    }  # fmt: skip
    write_json(run / "results" / "metrics.json", results)


def write_json(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results))


def write_arm(root, arm, seed, skill, luck):
    rng = np.random.default_rng(luck)
    truth = np.arange(300) % 3 == 0
    table = pd.DataFrame({"id": np.arange(300), "lesion_id": "", "source": "X"})
    for a in ATTRIBUTES:
        logit = (2 * truth - 1) * skill + rng.normal(size=300)
        table[a], table[f"p_{a}"] = truth.astype(int), 1 / (1 + np.exp(-logit))
    run = root / "table4" / arm / f"seed_{seed}"
    write_json(
        run / "results" / "metrics.json",
        {"kind": "classifier", "arm": arm, "seed": seed, "provenance": {"data": "same"}},
    )
    table.to_csv(run / "results" / "predictions.csv", index=False)


def finished(folder, data):
    """Write what the stages leave."""
    write_samples(folder / "sd", "SD", manifest(0, 0.6), data)
    write_samples(folder / "ddpo", "SD+RL", manifest(1, 0.97), data)
    arms = (("real", 1, 0), ("oversampling", 1, 5), ("classical", 1, 7), ("sd", 1, 9))
    for arm, skill, luck in (*arms, ("sd_rl", 4, 0)):
        for seed in range(3):
            write_arm(folder, arm, seed, skill, luck + seed)
    return folder


@pytest.fixture
def runs(data, tmp_path):
    return finished(tmp_path, data)


@pytest.fixture(scope="module")
def reported(data, tmp_path_factory):
    """Runs that were moved after they had finished, and reported in their new place."""
    made = finished(tmp_path_factory.mktemp("made"), data)
    moved = made.rename(made.with_name("moved"))
    main(["report", str(moved)])
    return moved


def test_all_tables_and_figures_come_out_of_finished_runs_that_were_moved(reported):
    made = {path.name for path in (reported / "report").iterdir()}
    page = (reported / "report" / "report.md").read_text()
    for table in ("table_1", "table_2", "table_3", "table_4", "subgroups"):
        assert {f"{table}.md", f"{table}.csv", f"{table}.tex"} <= made
    for figure in ("figure_1.png", "figure_3.png", "figure_4.png", "leakage.png"):
        with Image.open(reported / "report" / figure) as image:
            assert min(image.size) > 150
        assert figure in page
    assert list((reported / "report" / "tensorboard").glob("events*"))
    assert "Figure 1" in page
    # nobody has measured these runs over guidance
    assert re.findall(r"\*\*(.+)\*\* is missing", page) == [
        "Frontier", "What guidance gives, and what training adds",
    ]  # fmt: skip


def test_the_tables_hold_our_numbers_beside_the_papers(reported):
    out = reported / "report"
    read = {name: pd.read_csv(out / f"{name}.csv", index_col=0) for name in
            ("table_1", "table_2", "table_3", "subgroups")}  # fmt: skip
    assert read["table_1"].loc["train, paper", "images"] == "12,004"
    shown = manifest(1, 0.97)
    hits = exact(shown, readings(shown, "judge", DERMOSCOPY), DERMOSCOPY)
    ink = hits[(shown["prompt"] == "a dermoscopic image with melanoma (MEL) showing ink")]
    assert read["table_2"].loc["SD+RL, APR %", "MEL+ink"].startswith(f"{100 * ink.mean():.1f} [")
    assert float(read["table_2"].loc["SD, paper", "MEL+ruler"]) == 76.56
    apr = read["table_3"].loc["APR %"]
    assert apr["SD+RL"].startswith(f"{100 * hits.mean():.1f} [")
    assert apr["SD+RL, paper"] == "63.14"
    assert read["table_3"].loc["FID", "SD"] == "-"
    assert "no Inception weights here: fetch it" in (out / "table_3.md").read_text()
    table = read["subgroups"]
    assert len(table) == 33
    for split in ("train", "test"):
        assert table[split].astype(int)[:-1].sum() == int(table[split].iloc[-1])
    assert "not estimable" in table["real test read right %"].to_list()
    verdicts = pd.read_csv(out / "table_4.csv")
    by_arm = verdicts.groupby("training")["F1 vs real"]
    assert by_arm.get_group("Real + SD-RL").str.endswith("better").sum() >= 4
    assert by_arm.get_group("Real + SD").str.endswith("no evidence").all()
    tex = (out / "table_2.tex").read_text()
    assert re.search(r"\\begin\{tabular\}\{l{9}\}", tex)
    assert r"APR \%" in tex
    assert not re.search(r"(?<!\\)[%#_]", tex)


@pytest.mark.parametrize("alone", [False, True])
def test_draft_stands_beside_ddpo_or_in_its_place(runs, data, alone):
    shown = manifest(5, 0.9)
    shutil.rmtree(runs / "table4")
    write_samples(runs / "draft", "SD+DRaFT", shown, data)
    models = ["SD", "SD+RL", "SD+DRaFT"]
    if alone:
        shutil.rmtree(runs / "ddpo")
        models.remove("SD+RL")
    out = runs / "report"
    main(["report", str(runs)])
    hits = exact(shown, readings(shown, "judge", DERMOSCOPY), DERMOSCOPY)
    table = pd.read_csv(out / "table_3.csv", index_col=0)
    assert list(table.columns[: len(models)]) == models
    assert table.loc["APR %", "SD+DRaFT"].startswith(f"{100 * hits.mean():.1f} [")
    two = pd.read_csv(out / "table_2.csv", index_col=0)
    ours = [row for row in two.index if row.endswith("APR %")]
    assert ours == [f"{model}, APR %" for model in models]
    assert "SD+DRaFT - SD, points" in two.index
    page = (out / "report.md").read_text()
    said = [f"from SD to {model} at the same guidance" in page for model in models[1:]]
    assert all(said)
    assert (out / "leakage_sd_draft.csv").exists()
    widths = {Image.open(out / f"figure_{n}.png").width for n in (1, 4)}
    assert min(widths) > 150 * len(models)


def test_what_is_missing_names_the_command_that_makes_it(runs):
    (runs / "ddpo" / "results" / "metrics.json").unlink()
    for path in (runs / "table4" / "sd_rl").rglob("metrics.json"):
        path.unlink()
    main(["report", str(runs)])
    page = (runs / "report" / "report.md").read_text()
    assert "**Table 3** is missing, made by: `rl4med-ddpo test --config ddpo.yaml`" in page
    assert re.search(
        r"\*\*Table 4\*\* is missing, three seeds each of sd_rl made by: `python -m \S+table_4",
        page,
    )
    assert "Figure 1. The same noise, before and after training** is missing" in page
    assert "## Table 1" in page


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"judge": {"sha256": "bb"}}, "judge.sha256: aa in SD+RL, bb in SD"),
        ({"sampler": {"seed": 1}}, "sampler.seed: 0 in SD+RL, 1 in SD"),
        ({"samples": 7}, "samples: 96 in SD+RL, 7 in SD"),
    ],
)
def test_runs_that_rest_on_different_things_are_refused(runs, change, says):
    path = runs / "sd" / "results" / "metrics.json"
    results = json.loads(path.read_text())
    results["provenance"] |= change
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match=re.escape(says)):
        main(["report", str(runs)])
    assert not (runs / "report").exists()


@pytest.mark.parametrize(
    ("sd", "sd_rl", "differ"),
    [
        ({"before_training": "aa"}, {"before_training": "aa"}, False),
        ({"before_training": "aa", "pipeline": "moved"}, {"before_training": "aa"}, False),
        ({"before_training": "aa"}, {"before_training": "bb"}, True),
        ({"sampler": {"seed": 0, "digest of unet": "aa"}}, {"before_training": "aa"}, False),
        ({"sampler": {"seed": 0, "digest of unet": "aa"}}, {"before_training": "bb"}, True),
        ({"pipeline": "runs/sd/pipeline"}, {"pipeline": "runs/other/pipeline"}, True),
    ],
)
def test_a_baseline_of_another_model_is_refused(runs, sd, sd_rl, differ):
    for name, change in (("sd", sd), ("ddpo", sd_rl)):
        path = runs / name / "results" / "metrics.json"
        results = json.loads(path.read_text())
        results["provenance"] |= change
        path.write_text(json.dumps(results))
    if not differ:
        assert find_runs([runs]).samples.keys() == {"SD", "SD+RL"}
        return
    with pytest.raises(UserError, match="SD is not the model that SD\\+RL was trained from"):
        main(["report", str(runs)])
    assert not (runs / "report").exists()


def test_the_least_and_greatest_of_halvings_are_no_interval(runs):
    path = runs / "ddpo" / "results" / "metrics.json"
    results = json.loads(path.read_text())
    now = {"value": 2.0, "interval": None, "range": [1.25, 3.5], "n": 9, "n_real": 9}
    before = {"value": 5.0, "interval": [4.0, 6.0], "n": 9, "n_real": 9}
    estimate = {"value": 7.0, "interval": [6.5, 7.5], "n": 9, "n_real": 9}
    scores = {"noise_floor": now, "frechet_equal_n": before, "frechet": estimate}
    results["distribution"] = {"classifier": scores}
    path.write_text(json.dumps(results))
    rows = quality_table(find_runs([runs])).rows.set_index("score")["SD+RL"]
    assert rows["noise floor, real against real"] == "2.00 (1.25 to 3.50)"
    assert rows["Frechet distance, at the floor's n"] == "5.00 (4.00 to 6.00)"
    assert rows["Frechet distance, classifier features"] == "7.00 [6.50, 7.50]"


def test_folders_that_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nowhere is not one"):
        main(["report", "nowhere"])
    with pytest.raises(SystemExit) as end:
        main(["report"])
    assert end.value.code == 2
    assert "arguments are required: runs" in capsys.readouterr().err


def test_a_folder_without_results_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match=r"rl4med-ddpo test --config ddpo\.yaml"):
        main(["report", str(tmp_path)])


def test_leakage_counts_what_the_networks_read():
    table = manifest(2, 0.7)
    matrix = leak_matrix(table, DERMOSCOPY)
    assert matrix.shape == (32, 6)
    for name, condition, prompt in zip(matrix.index, CONDITIONS, PROMPTS, strict=True):
        rows = table[table["prompt"] == prompt]
        assert name == short_name(condition)
        assert matrix.loc[name, "ink"] == (rows["judge_ink"] > 0.5).mean()
        assert matrix.loc[name, "NV"] == (rows["reward_NV"] > 0.5).mean()


def test_a_table_as_markdown():
    rows = pd.DataFrame({"a": ["1", "2"], "b": ["x", "y"]})
    assert markdown(rows) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"


def test_table_4_holds_the_mean_scores_of_each_arm_and_what_they_gain(reported):
    numbers = pd.read_csv(reported / "report" / "table_4_numbers.csv")
    arms = {}
    for path in sorted((reported / "table4").rglob("predictions.csv")):
        seed = json.loads(path.with_name("metrics.json").read_text())["seed"]
        arms.setdefault(path.parts[-4], {})[seed] = pd.read_csv(path)
    formulas = {"f1": binary_f1_score, "accuracy": binary_accuracy, "auroc": binary_auroc}

    def scores(arm, score):
        said = (torch.tensor(one[["p_ink", "ink"]].to_numpy()) for one in arms[arm].values())
        return np.mean(
            [formulas[score](p, truth.long()).item() for p, truth in (x.T for x in said)]
        )

    found = numbers[numbers["attribute"] == "ink"].set_index(["score", "arm"])
    assert len(found) == len(formulas) * len(arms) == 15
    for (score, arm), row in found.iterrows():
        assert row["value"] == pytest.approx(scores(arm, score), rel=1e-5)
        if arm != "real":
            gained = scores(arm, score) - scores("real", score)
            assert row["difference"] == pytest.approx(gained, abs=1e-5)


def test_the_report_opens_with_what_training_changed(data, tmp_path):
    """Hair is forgotten in one of four images that ask for it; all else gets right."""
    before = pd.concat([manifest(3, 0.75)], ignore_index=True)
    after = before.copy()
    for a in ARTIFACTS:
        after[f"judge_{a}"] = np.where(after[a] == 1, 0.9, 0.1)
    before["judge_hair"] = np.where(before["hair"] == 1, 0.9, 0.1)
    forgotten = (after["hair"] == 1) & (after["index"] % 96 < 32)
    after.loc[forgotten, "judge_hair"] = 0.1
    close, far = ({"value": v, "interval": [v - 0.1, v + 0.1]} for v in (0.5, 0.9))
    for name, model, table, kernel in (("sd", "SD", before, close), ("ddpo", "SD+RL", after, far)):
        write_samples(tmp_path / name, model, table, data)
        path = tmp_path / name / "results" / "metrics.json"
        results = json.loads(path.read_text())
        results["distribution"] = {"classifier": {"kernel": kernel, "recall": close}}
        write_json(path, results)
    said = changes_paragraph(find_runs([tmp_path]), "SD+RL")
    better, worse, fallen = re.split(r"\*\*(?:Worse|Prompts whose APR fell):\*\*", said)
    hits = exact(before, readings(before, "judge", DERMOSCOPY), DERMOSCOPY).mean()
    assert f"APR {hits:.3f} to {1 - forgotten.mean():.3f}" in better
    ink = before["judge_ink"][before["ink"] == 0].gt(0.5).mean()
    assert f"ink where not asked for {ink:.3f} to 0.000" in better
    assert worse.strip().startswith("kernel distance 0.500 to 0.900, hair where asked for 1.000 to")
    assert "recall" not in said
    assert fallen.strip() == "none."


def test_guidance_alone_stands_beside_what_training_adds(runs):
    for name, model, shift in (("sd", "SD", 0.0), ("ddpo", "SD+RL", 0.08)):
        points = [
            {
                "guidance": w, "val_apr": apr, "reward": 0.9, "n": 100, "correct": 0,
                "apr": apr + shift, "apr_interval": [apr + shift - 0.05, apr + shift + 0.05],
                "diversity_right": {
                    "value": 5 - w / 10, "interval": None, "n": 9, "left_out": ["MEL"],
                },
                "distance": {"value": 0.3, "interval": [0.2, 0.4], "n_real": 50},
                "worst_prompts": {"NV+ink": 0.1}, "prompts": {"NV+ink": 0.1},
            }
            for w, apr in ((1.5, 0.6), (5.0, 0.88), (7.5, 0.87))
        ]  # fmt: skip
        write_json(
            runs / name / "results" / "frontier.json",
            {
                "model": model, "guidance": 1.5, "best_guidance": 5.0, "points": points,
                "real": {
                    "diversity_right": {"value": 5.0, "interval": None, "n": 50}, "n": 50,
                    "folder": "real",
                },
            },
        )  # fmt: skip
    found = find_runs([runs])
    table = quality_table(found).rows.set_index("score")
    assert list(table.columns[:3]) == ["SD", "SD, best guidance 5", "SD+RL"]
    assert table.loc["APR %", "SD, best guidance 5"] == "88.0 [83.0, 93.0]"
    # the images drawn for the table count there, and those of the curve at other guidances
    assert table.loc["APR %", "SD+RL"] == percent(found.samples["SD+RL"])
    assert table.loc["diversity among images read right"].tolist()[:3] == ["4.85", "4.50", "4.85"]
    over = frontier_table(found)
    assert over.rows["model"].tolist().count("SD (best)") == 1
    assert len(over.rows) == 6
    assert "SD at its best guidance" in over.notes[0]
    left, right = frontier_figure(found.frontiers).axes
    for axis, across in ((left, [0.3] * 3), (right, [4.85, 4.5, 4.25])):
        curves = [c.lines[0] for c in axis.containers]
        assert [c.get_label() for c in axis.containers] == ["SD", "SD+RL"]
        assert curves[1].get_xdata() == pytest.approx(across)
        assert curves[1].get_ydata() == pytest.approx([68.0, 96.0, 95.0])
