"""The command line from a clone: `rl4med-ddpo fit --config ddpo.yaml`; see `command_line`."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

try:
    import rl4med_ddpo
except ModuleNotFoundError:
    sys.exit(f"error: the package is not installed here. Install it first: pip install -e {HERE}")
if Path(rl4med_ddpo.__file__).resolve().parent != HERE:
    sys.exit(
        f"error: this is {HERE}/run.py, but the installed package is that of "
        f"{Path(rl4med_ddpo.__file__).parent}. Install this one: pip install -e {HERE}"
    )

if __name__ == "__main__":
    from rl4med_ddpo.command_line import run

    run()
