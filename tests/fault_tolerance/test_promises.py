import re

from support.command_line import ROOT


def test_the_readme_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text()))
    there = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) > 15
    assert named <= there
