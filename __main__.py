"""`python -m rl4med_ddpo fit --config ddpo.yaml`."""

from rl4med_ddpo.command_line import run

if __name__ == "__main__":
    run()
