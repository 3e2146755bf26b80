"""What the course of a run depends on, and what of it has changed since a checkpoint."""

from collections.abc import Iterable, Iterator
from typing import Any

from rl4med_ddpo.foundation.class_names import with_current_names
from rl4med_ddpo.foundation.files import located
from rl4med_ddpo.foundation.hashes import sha256_of

IGNORED_KEYS = frozenset(
    {
        # what is written or measured
        "model.policy",
        "model.judge",
        "model.cache",
        "data.copies",
        "data.validation_samples_per_prompt",
        "data.test_samples_per_prompt",
        "data.eval_batch_size",
        "data.predict_batch_size",
        # how it is computed: the same up to the rounding of sums
        "model.sample_batch",
        "model.micro_batch",
        "model.trajectory",
        "model.gradient_checkpointing",
        "model.compile",
        "model.max_skipped",
        "data.num_workers",
    }
)
TRAINER_SETTINGS = (
    "limit_val_batches",
    "overfit_batches",
    "sync_batchnorm",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
)
SHA256 = "sha256 of "
COMMIT = "commit of "
CONTENT = "content of "


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Name, by the keys of the command line, all values that decide the course of a run.

    Where a value of the model is a file or folder, the hash of its content is among them.

    Args:
        config: Of one subcommand, with `model`, `data`, `trainer` and `seed_everything`.
    """
    trainer = config.get("trainer") or {}
    settings = {"seed_everything": config.get("seed_everything")}
    for part in ("model", "data"):
        settings |= {k: v for k, v in _flat(part, config.get(part)) if not _is_neutral(k)}
    settings |= {f"trainer.{name}": trainer.get(name) for name in TRAINER_SETTINGS}
    return settings | {
        SHA256 + key: sha256_of(located(value))
        for key, value in settings.items()
        if key.startswith("model.") and isinstance(value, str) and _exists(value)
    }


def differences(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name the settings that both know and that differ, each with both values."""
    saved = with_current_names(saved)
    return {key: (saved[key], now[key]) for key in saved if key in now and saved[key] != now[key]}


def is_allowed(key: str, allowed: Iterable[str]) -> bool:
    """Tell whether a key was named, or the end of it after a point.

    The hash of a file, or the commit of a hub id, goes with the option that names it.
    """
    name = key.removeprefix(SHA256).removeprefix(COMMIT).removeprefix(CONTENT)
    return any(name == given or name.endswith(f".{given}") for given in allowed)


def callback_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Name the options of the run's own callbacks, without folders, and the limit of its time.

    Args:
        config: Of one subcommand, with `trainer`.
    """
    trainer = config.get("trainer") or {}
    own = trainer.get("callbacks") or []
    named = {"Timer.max_time": str(trainer.get("max_time"))}
    for callback in own if isinstance(own, list) else [own]:
        name = callback["class_path"].rpartition(".")[2]
        named[name] = callback["class_path"]
        options = _flat(name, callback.get("init_args") or {})
        named |= {key: value for key, value in options if not key.endswith("dirpath")}
    return named


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Give nested values one key each, as they are typed: without `class_path` and `init_args`."""
    if not isinstance(value, dict):
        yield key, value if isinstance(value, str | int | float | list | None) else str(value)
        return
    for name, inner in value.items():
        if name == "class_path":
            yield key, inner
        elif name in ("init_args", "dict_kwargs"):
            yield from _flat(key, inner or {})
        else:
            yield from _flat(f"{key}.{name}", inner)


def _is_neutral(key: str) -> bool:
    return any(key == neutral or key.startswith(f"{neutral}.") for neutral in IGNORED_KEYS)


def _exists(value: str) -> bool:
    try:
        return located(value).exists()
    except OSError:
        return False
