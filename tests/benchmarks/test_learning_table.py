import json
import sys
from pathlib import Path

from benchmarks import learning_table

PAGE = Path(__file__).parents[2] / "docs" / "why_rl.md"


def run(method, seed, aprs, frontier, best):
    points = [
        {
            "guidance": w, "apr": apr, "apr_interval": [apr - 0.02, apr + 0.02], "val_apr": apr,
            "diversity_right": diversity, "distance": 0.2, "worst_prompt": 0.5,
        }
        for w, apr, diversity in frontier
    ]  # fmt: skip
    curve = {"images": [512 * (i + 1) for i in range(len(aprs))], "apr": aprs}
    curve["cpu_s"] = [30.0 * (i + 1) for i in range(len(aprs))]
    return {
        "method": method, "seed": seed, "label": "same estimator", **(curve if aprs else {}),
        "frontier": points, "best_guidance": best, "guidance": 3.0,
    }  # fmt: skip


RUNS = [
    run("sd", 0, [], [(3.0, 0.80, 5.2), (7.5, 0.90, 4.8)], 7.5),
    run("sd", 1, [], [(3.0, 0.84, 5.0), (7.5, 0.88, None)], 3.0),
    run("window", 1, [0.80, 0.82, 0.90], [(3.0, 0.92, 5.0)], 3.0),
    run("window", 0, [0.88, 0.89, 0.89], [(3.0, 0.96, 4.6)], 3.0),
]


def test_means_stand_beside_the_least_and_greatest_and_images_beside_sd_s_best():
    sd, sd_at_best, window, _ = learning_table.table(RUNS).splitlines()[2:]
    assert sd.split(" | ")[6:8] == ["3", "82.0 (80.0 to 84.0)"]
    cells = sd_at_best.split(" | ")
    assert cells[6:9] == ["7.5, 3", "87.0 (84.0 to 90.0)", "4.90 (4.80 to 5.00)"]
    cells = window.split(" | ")
    # of seed 0 and 1; against .90 and .84 of their own SD
    assert cells[2:5] == ["2", "1,536", "90 (90 to 90)"]
    assert cells[5] == "not reached, 1,536"


def test_the_page_gets_the_table_and_keeps_its_words(tmp_path, monkeypatch):
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_text("before\n<!-- learning -->\nold\n<!-- end -->\nafter\n")
    results.write_text("\n".join(map(json.dumps, RUNS)))
    out = tmp_path / "learning"
    monkeypatch.setattr(sys, "argv", ["x", str(results), f"--output={out}", f"--page={page}"])
    learning_table.main()
    table = learning_table.table(RUNS)
    assert page.read_text() == f"before\n<!-- learning -->\n{table}<!-- end -->\nafter\n"
    assert (out / "frontier.png").stat().st_size > 10_000


def test_the_shipped_page_says_what_its_results_say():
    folder = PAGE.parent / "learning"
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert f"<!-- learning -->\n{learning_table.table(results)}<!-- end -->" in PAGE.read_text()
