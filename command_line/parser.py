"""Read the command line: find configurations, and answer a mistake in one message."""

import difflib
import importlib
import inspect
import logging
import os
import pydoc
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from rl4med_ddpo.foundation.class_names import with_current_names
from rl4med_ddpo.lightning_modules.rewards.base import Reward

CONFIGS = Path(__file__).parents[1] / "configs"
KINDS: dict[str, type] = {
    "model": L.LightningModule,
    "data": L.LightningDataModule,
    "reward": Reward,
    "rewards": Reward,
    "optimizer": torch.optim.Optimizer,
    "lr_scheduler": torch.optim.lr_scheduler.LRScheduler,
    "callbacks": L.Callback,
    "logger": Logger,
}
"""What the classes are that an option names, by the last part of its key."""
OUTER = "\n    - Expected a <class 'NoneType'>"
"""What follows, about the option around it, once a message has named the innermost one."""
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true, false",
    "str": "text",
}


class ConfigFile(ActionConfigFile):
    """Looks for a configuration in the working directory, then among the shipped ones."""

    def __call__(self, parser: Any, config: Any, value: Any, option: str | None = None) -> None:
        """Apply the file named by `value`."""
        value = os.path.expanduser(value) if isinstance(value, str) else value
        if isinstance(value, str) and not Path(value).exists():
            if value not in _shipped():
                near = difflib.get_close_matches(value, _shipped(), n=1)
                parser.error(
                    f"there is no configuration {value}, neither here nor among the shipped ones: "
                    + ", ".join(_shipped())
                    + "".join(f"\n  Did you mean {name}?" for name in near)
                )
            value = str(CONFIGS / value)
        if isinstance(value, str) and (damage := _damage(Path(value))):
            parser.error(f"the configuration {value} cannot be read: {damage}")
        super().__call__(parser, config, value, option)


def _damage(path: Path) -> str | None:
    """Say what keeps a file from being a configuration."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return str(error)
    if not isinstance(content, dict):
        return f"it holds {type(content).__name__}, and not settings as `trainer: ...`"
    return None


class LeftOut(logging.Handler):
    """Says which options of a configuration's model the class named instead of it does not have.

    jsonargparse drops them, and tells its debug log alone.
    """

    DROPPED = re.compile(
        r"class_path change from '(\S+)' to '(\S+)', discarding init_args: (\{.*\})", re.DOTALL
    )

    def emit(self, record: logging.LogRecord) -> None:
        """Pick out that message and warn; a warning is shown once, however often it is parsed."""
        found = self.DROPPED.search(record.getMessage())
        if found is None:
            return
        kind: Any = pydoc.locate(found[2])
        if not (kind and issubclass(kind, L.LightningModule)):
            return
        names = ", ".join(re.findall(r"'(\w+)': ", found[3]))
        before, after = (name.rpartition(".")[2] for name in found.groups()[:2])
        said = f"Left out, for {after} has no such options as the {before} of the configuration: "
        rank_zero_warn(said + names)


LOG = logging.getLogger("rl4med_ddpo.parser")
LOG.setLevel(logging.DEBUG)
LOG.propagate = False
LOG.addHandler(LeftOut())


class Parser(LightningArgumentParser):
    """Answers a mistake with one message, and a misspelt name with the nearest known one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # lightning passes whether to log at all
        kwargs["logger"] = LOG
        super().__init__(*args, **kwargs)

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration; class names of before 0.2 still mean the same classes."""
        return super().parse_string(with_current_names(content), *args, **kwargs)

    def _check_value_key(self, action: Any, value: Any, *args: Any, **options: Any) -> Any:
        """Check a value; a reference is checked once it is resolved.

        jsonargparse would drop it, without a word, when a command names another class for the
        options of a configuration.
        """
        if isinstance(value, str) and "${" in value:
            return value
        return super()._check_value_key(action, value, *args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"error: {_explained(message) or message}\n")


def _explained(message: str) -> str | None:
    """Say in a line what is wrong, if it is one of the mistakes that people make."""
    if found := re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message):
        commands = [*found[2].replace("'", "").split(", "), "report"]
        return f"{_unknown('command', found[1], commands)} Commands: {', '.join(commands)}"
    if found := re.search(r"required: (\w+)\.", message):
        return f"{found[1]} needs a configuration: --config NAME. Shipped: {', '.join(_shipped())}"
    if found := re.search(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message):
        path, name = found.groups()
        kind = pydoc.locate(path)
        assert isinstance(kind, type)
        parameters = (inspect.signature(c).parameters for c in kind.__mro__[:-1])
        return _unknown(f"option of {path}", name, {p for names in parameters for p in names})
    if found := re.search(r"(?:accept option '|unrecognized arguments: --)([\w.]+)", message):
        trainer = {f"trainer.{name}" for name in inspect.signature(L.Trainer).parameters}
        root, *rest = found[1].split(".")
        near = difflib.get_close_matches(root, ["trainer", "model", "data"], n=1) or [root]
        known = trainer | {".".join([*near, *rest]), "config", "ckpt_path", "seed_everything"}
        return _unknown("option", found[1], known - {found[1]})
    return _unloadable(message) or _wrong_value(message)


def _unloadable(message: str) -> str | None:
    """Say why a class named by module and name cannot be had, as one's own beside the run."""
    named = re.findall(r"(?:class_path |a path but )'?([\w.]+\.\w+)(?:'| either)", message)
    nested = re.findall(r"NestedArg\(key='(\w+)', val='([\w.]+\.\w+)'", message)
    for path in [*(value for key, value in nested if key in KINDS), *reversed(named)]:
        module, _, name = path.rpartition(".")
        try:
            found = vars(importlib.import_module(module))
        # a module of the user's raises what it likes
        except Exception as error:
            return (
                f"{path} cannot be loaded: {error}. The module {module} is looked for in the "
                f"working directory, {os.getcwd()}, and among the installed packages"
            )
        if name not in found:
            classes = {key for key, value in found.items() if isinstance(value, type)}
            return _unknown(f"class in {module}", name, classes)
    return None


def _wrong_value(message: str) -> str | None:
    """Name the option, its value and what is allowed, of a message about nested types."""
    option = ".".join(re.findall(r'Parser key "(.+?)"', message))
    values = re.findall(r"(?:Given value: |Got value: |path string: )(\S+?)\.?(?=\s|$)", message)
    plain = [value for value in values if not value.startswith(("NestedArg(", "Namespace(", "{"))]
    if not option or not plain:
        return None
    value, kind = plain[0], option.rpartition(".")[2]
    if kind == "seed" and value == "True":
        return "--seed_everything is true; a run is repeated by its number: give one, such as 42"
    a_class = "dot import path" in message
    if not (a_class and kind in KINDS) and (allowed := _allowed(message)):
        return f"--{option} is {value}; allowed: {' or '.join(allowed)}"
    if a_class:
        return _unknown("class", value, _subclasses(KINDS.get(kind, object)), of=f"--{option}")
    return None


def _allowed(message: str) -> list[str]:
    """Word the plain types that a message expects, of the innermost option."""
    inner, _, _ = message[message.rindex('Parser key "') :].partition(OUTER)
    named = [words for name, words in TYPES.items() if f"Expected a <class '{name}'>" in inner]
    choices = [
        ", ".join(re.findall(r"[\w.-]+", literal))
        for literal in re.findall(r"Expected a typing.Literal\[(.+?)\]", inner)
    ]
    found = [*named, *(f"one of {choice}" for choice in choices)]
    null = found and "<class 'NoneType'>" in inner
    return [*found, "null"] if null else found


def _subclasses(kind: type) -> set[str]:
    """Name all public classes of a kind that are loaded."""
    if kind is object:
        return set().union(*map(_subclasses, KINDS.values()))
    below = [c for child in kind.__subclasses__() for c in _subclasses(child)]
    return {n for n in (kind.__name__, *below) if not n.startswith("_")}


def _shipped() -> list[str]:
    return sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))


def _unknown(kind: str, name: str, known: Iterable[str], of: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f" Did you mean {near[0]}?" if near else f" Known are: {', '.join(sorted(known))}"
    return f"{of}{': ' * bool(of)}there is no {kind} named {name}.{hint}"
