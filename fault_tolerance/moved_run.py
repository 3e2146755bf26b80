"""Follow a run folder that was moved: Lightning's checkpoint callbacks keep absolute paths."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


def follow_move(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Point the state of each ModelCheckpoint to its files in the trainer's folders.

    Otherwise Lightning forgets the best score, and a worse checkpoint replaces `best.ckpt`. The
    state is left as it is where the folder has none of its files: then it was not moved.

    Args:
        trainer: Of the resumed run.
        checkpoint: Loaded, not yet restored; changed in place.
    """
    states = checkpoint.get("callbacks", {})
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.state_key not in states:
            continue
        state, folder = states[callback.state_key], callback.dirpath
        if not folder or state.get("dirpath") in (None, folder):
            continue
        moved = {
            name: str(path)
            for name in _files_of(state)
            if (path := Path(folder) / Path(name).relative_to(state["dirpath"])).exists()
        }
        if not moved:
            continue
        state |= {name: moved.get(state[name], state[name]) for name in PATHS if name in state}
        best = state.get("best_k_models", {})
        state["best_k_models"] = {moved.get(path, path): score for path, score in best.items()}
        state["dirpath"] = folder


def _files_of(state: dict[str, Any]) -> list[str]:
    """List the files in the folder that a state names."""
    named = {state.get(name, "") for name in PATHS} | set(state.get("best_k_models", {}))
    return sorted(n for n in named if n and Path(n).is_relative_to(state["dirpath"]))
