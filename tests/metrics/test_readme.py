"""E13: what the README says of results is what the report's files say."""

from metrics.readme import ROOT, rendered


def test_the_readmes_tables_are_those_of_the_report():
    readme = (ROOT / "README.md").read_text()
    assert rendered(readme) == readme


def test_a_block_follows_its_file(tmp_path):
    folder = tmp_path / "docs" / "report"
    folder.mkdir(parents=True)
    (folder / "table_3.md").write_text("## Table 3\n\n| a |\n| --- |\n| 2 |\n")
    text = "before\n<!-- docs/report/table_3.md -->\n| 1 |\n<!-- end -->\nafter\n"
    expected = (
        "before\n<!-- docs/report/table_3.md -->\n| a |\n| --- |\n| 2 |\n<!-- end -->\nafter\n"
    )
    assert rendered(text, tmp_path) == expected
    assert rendered(expected, tmp_path) == expected
