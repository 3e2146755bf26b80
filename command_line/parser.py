"""Read the command line: find configurations, and answer a mistake in one message."""

import difflib
import inspect
import pydoc
import re
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser

from rl4med_ddpo import callbacks, datamodules, lightning_modules
from rl4med_ddpo.foundation.class_names import with_current_names

CONFIGS = Path(__file__).parents[1] / "configs"


class ConfigFile(ActionConfigFile):
    """Looks for a configuration in the working directory, then among the shipped ones."""

    def __call__(self, parser: Any, config: Any, value: Any, option: str | None = None) -> None:
        """Apply the file named by `value`."""
        if isinstance(value, str) and not Path(value).exists():
            shipped = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))
            if value not in shipped:
                parser.error(
                    f"there is no configuration {value}, neither here nor among the shipped ones: "
                    + ", ".join(shipped)
                )
            value = str(CONFIGS / value)
        super().__call__(parser, config, value, option)


class Parser(LightningArgumentParser):
    """Answers a mistake with one message, and a misspelt name with the nearest known one."""

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration; class names of before 0.2 still mean the same classes."""
        return super().parse_string(with_current_names(content), *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"error: {_misspelt(message) or message}\n")


def _misspelt(message: str) -> str | None:
    """Say which name is unknown and which is near it, if that is what a message is about."""
    if found := re.search(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message):
        path, name = found.groups()
        kind = pydoc.locate(path)
        assert isinstance(kind, type)
        parameters = (inspect.signature(c).parameters for c in kind.__mro__[:-1])
        return _unknown(f"option of {path}", name, {p for names in parameters for p in names})
    if found := re.search(r"Expected a dot import path string: (\w+)", message):
        classes = (
            *lightning_modules.__all__,
            *datamodules.__all__,
            *callbacks.__all__,
        )
        return _unknown("class", found[1], set(classes))
    if found := re.search(r"(?:accept option '|unrecognized arguments: --)([\w.]+)", message):
        trainer = {f"trainer.{name}" for name in inspect.signature(L.Trainer).parameters}
        root, *rest = found[1].split(".")
        near = difflib.get_close_matches(root, ["trainer", "model", "data"], n=1) or [root]
        known = trainer | {".".join([*near, *rest]), "config", "ckpt_path", "seed_everything"}
        return _unknown("option", found[1], known - {found[1]})
    return None


def _unknown(kind: str, name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" Known are: {', '.join(sorted(known))}"
    return f"there is no {kind} named {name}.{hint}"
