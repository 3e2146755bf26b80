"""Put the report's tables into the README: `python -m metrics.readme`; a test holds them equal.

A block of the README between `<!-- docs/report/NAME.md -->` and `<!-- end -->` is that file without
its heading.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- (docs/report/\w+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(readme: str, root: Path = ROOT) -> str:
    """Return a README with each block as its file in `root` says."""

    def block(found: re.Match[str]) -> str:
        _, _, body = (root / found[2]).read_text().partition("\n\n")
        return found[1] + body + found[3]

    return BLOCK.sub(block, readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))
