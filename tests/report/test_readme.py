"""E13: what the README says of results is what the report's files say, link by link."""

import json
import re

import pandas as pd

from rl4med_ddpo.foundation.hashes import sha256_of
from rl4med_ddpo.report.readme import FOLDER, ROOT, demo_table, rendered, taken
from rl4med_ddpo.report.report import markdown

REPORT = ROOT / FOLDER


def test_the_readmes_tables_are_those_of_the_report():
    readme = (ROOT / "README.md").read_text()
    assert readme.count(f"<!-- {FOLDER}/") >= 5
    assert rendered(readme) == readme


def test_what_the_pages_link_to_is_there():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    dead = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:\s]+)[)#]", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not dead


def test_the_reports_tables_are_those_of_its_manifest():
    hashes = json.loads((REPORT / "manifest.json").read_text())
    tables = {path.name: sha256_of(path) for path in REPORT.glob("*.csv")}
    assert tables == hashes["tables"]
    for name in ("table_1", "table_2", "table_3", "table_4", "subgroups"):
        rows = pd.read_csv(REPORT / f"{name}.csv", dtype=str, keep_default_na=False)
        rows = rows.rename(columns={"Unnamed: 0": ""})
        assert markdown(rows) in (REPORT / f"{name}.md").read_text()


def test_the_demos_table_is_that_of_its_scores():
    demos = json.loads((REPORT / "demo.json").read_text())
    assert (REPORT / "demo.md").read_text() == demo_table(demos)
    made_of = json.loads((REPORT / "manifest.json").read_text())["made of"]
    assert {"sd/results/metrics.json", "ddpo/results/metrics.json"} <= made_of.keys()


def finished_demo(run, seed, before):
    (run / "report").mkdir(parents=True)
    (run / "report" / "table_3.md").write_text(f"## Table 3\n\n| a |\n| --- |\n| {seed} |\n")

    def row(model, guidance, apr):
        return {
            "model": model, "guidance": guidance, "apr": apr,
            "apr_interval": [apr - 0.02, apr + 0.02],
            "n": 1024, "reward": 0.9, "diversity_right": {"value": 5 - guidance / 10},
            "distance": {"value": 0.25, "interval": [0.2, 0.3]},
            "prompts": {"MEL": apr, "NV+ink": apr / 2}, "worst_prompts": {},
        }  # fmt: skip

    results = {
        "sd": {"provenance": {"sampler": {"seed": seed}}},
        "rows": [
            row("SD, its best guidance", 7.5, 0.85), row("SD", 3.0, before),
            row("SD+RL", 3.0, 0.9), row("SD+DRaFT", 3.0, 0.96),
        ],
        "real": {
            "apr": 1.0, "apr_interval": [0.99, 1.0], "n": 750, "diversity_right": {"value": 5.0},
        },
    }  # fmt: skip
    (run / "results.json").write_text(json.dumps(results))
    return run


def test_finished_demos_are_taken_into_the_readme(tmp_path):
    runs = [finished_demo(tmp_path / f"run{i}", i, before) for i, before in enumerate((0.6, 0.8))]
    taken(runs, tmp_path)
    text = "".join(
        f"<!-- {FOLDER}/{name}.md -->\nold\n<!-- end -->\n" for name in ("demo", "table_3")
    )
    shown = rendered(text, tmp_path)
    assert "old" not in shown
    distance = "0.250 [0.200, 0.300]"
    assert (
        f"| `make demo` | SD, its best guidance | 7.5 | 85.0 [83.0, 87.0] | 4.25 | {distance} | "
        "NV+ink 42 % |\n"
        f"|  | SD | 3 | 60.0 [58.0, 62.0] | 4.70 | {distance} | NV+ink 30 % |\n"
        f"|  | SD+RL | 3 | 90.0 [88.0, 92.0] | 4.70 | {distance} | NV+ink 45 % |\n"
        f"|  | SD+DRaFT | 3 | 96.0 [94.0, 98.0] | 4.70 | {distance} | NV+ink 48 % |\n"
        "|  | real images | - | 100.0 [99.0, 100.0] | 5.00 | - | - |\n"
    ) in shown
    assert "| `make demo SEED=1 RUN=runs/demo1` | SD, its best guidance |" in shown
    assert f"|  | SD | 3 | 80.0 [78.0, 82.0] | 4.70 | {distance} | NV+ink 40 % |" in shown
    assert "| 0 |\n<!-- end -->" in shown
    assert rendered(shown, tmp_path) == shown
