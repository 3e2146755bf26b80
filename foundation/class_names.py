"""Class names in checkpoints, settings and YAML files of before 0.2, when there was no package."""

import re
from typing import Any

PACKAGE = "rl4med_ddpo"
FORMER = ("lightning_modules", "datamodules", "callbacks")
_FORMER = re.compile(rf"(?<![\w.])({'|'.join(FORMER)})\.(?:\w+\.)*([A-Z]\w*)")


def with_current_names(value: Any) -> Any:
    """Replace former class names in text and nested containers.

    `lightning_modules.ddpo.DDPO` becomes `rl4med_ddpo.lightning_modules.DDPO`; what is no former
    name stays.
    """
    if isinstance(value, str):
        return _FORMER.sub(rf"{PACKAGE}.\1.\2", value)
    if isinstance(value, dict):
        return {key: with_current_names(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_current_names(inner) for inner in value]
    return value
