"""Find the state that a run resumes from: the newest whole one; damaged ones are put aside."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from rl4med_ddpo.fault_tolerance.checkpoint_io import PART
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import sha256_of
from rl4med_ddpo.foundation.manifest import Manifest, manifest_path, read_manifest, write_manifest

CORRUPT = ".corrupt"


@dataclass(frozen=True)
class Found:
    """A checkpoint file whose content is what a manifest says."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Damaged:
    """A checkpoint file that cannot be resumed from, and why."""

    path: Path
    reason: str
    epoch: int | None


def newest_whole(folder: Path, repair: bool = True) -> Found | None:
    """Find the newest whole checkpoint of a folder from which training resumes exactly.

    Args:
        folder: Of the checkpoints.
        repair: Put damaged files aside as `.corrupt`, remove what an interrupted save left, and say
            so. One process of a run does this.

    Returns:
        None if the folder holds no checkpoint at all.

    Raises:
        UserError: if there are checkpoints and none is whole; it lists each.
    """
    if not folder.is_dir():
        return None
    found, damaged = _search(folder)
    if found is None and not damaged:
        return None
    if found is None:
        listed = "\n".join(f"    {d.path.name}: {d.reason}" for d in damaged)
        raise UserError(
            f"cannot resume: every checkpoint in {folder} is damaged:\n{listed}\n"
            "  Nothing was changed. Copy a whole one there again with its manifest, give one with "
            "--ckpt_path FILE,\n  or start from scratch with --ckpt_path null"
        )
    if repair:
        if damaged:
            rank_zero_warn(_fell_back(found, damaged))
        for bad in damaged:
            _put_aside(bad.path)
        _tidy(found)
    return found


def _search(folder: Path) -> tuple[Found | None, list[Damaged]]:
    """Take candidates from the newest on, until one is whole."""
    files = [p for p in folder.glob("*.ckpt") if p.is_file() and not p.is_symlink()]
    # a save that was cut between its two renames has left the manifest under another name
    known = [*folder.glob("*.ckpt.json"), *folder.glob(f"*.ckpt{PART}.json")]
    manifests = [m for p in known if (m := read_manifest(p)) is not None]
    by_hash = {m.sha256: m for m in manifests}
    sizes = {m.bytes for m in manifests}
    own = {p: read_manifest(manifest_path(p)) for p in files}
    damaged, others = [], []
    for path in sorted(files, key=lambda p: _age(p, own[p]), reverse=True):
        size = path.stat().st_size
        matching = by_hash.get(sha256_of(path)) if size in sizes else None
        if matching is None:
            damaged.append(Damaged(path, _reason(own[path], size), (m := own[path]) and m.epoch))
        elif matching.between_steps:
            return Found(path, matching), damaged
        else:
            others.append(Found(path, matching))
    # a run that saves in validation alone has nothing else
    return (others[0] if others else None), damaged


def _age(path: Path, manifest: Manifest | None) -> tuple[int, float]:
    """Order by progress where it is known; what has no manifest is a save cut short, so newest."""
    step = manifest.global_step if manifest else sys.maxsize
    return step, path.stat().st_mtime


def _reason(manifest: Manifest | None, size: int) -> str:
    if manifest is None:
        return "it has no manifest: its save was cut short, or the manifest was removed"
    if size != manifest.bytes:
        return f"it has {size:,} bytes, its manifest says {manifest.bytes:,}"
    return "its content is not what its manifest says (sha256 differs)"


def _fell_back(found: Found, damaged: Iterable[Damaged]) -> str:
    lines = [
        f"  {d.path.name}: {d.reason}" + (f"; lost: {_lost(d.epoch, found)}" if d.epoch else "")
        for d in damaged
    ]
    return (
        f"{len(lines)} damaged checkpoint(s) in {found.path.parent}, kept as *{CORRUPT}:\n"
        + "\n".join(lines)
        + f"\n  The run resumes from {found.path.name} (epoch {found.manifest.epoch}, "
        f"{found.manifest.global_step} optimizer steps); what came after is computed again."
    )


def _lost(epoch: int, found: Found) -> str:
    n = epoch - found.manifest.epoch
    return f"{n} epoch{'s' * (n != 1)} (rollouts, in DDPO)"


def _put_aside(path: Path) -> None:
    for file in (path, manifest_path(path)):
        if file.exists():
            os.replace(file, file.with_name(file.name + CORRUPT))


def _tidy(found: Found) -> None:
    """Clear away what an interrupted save left; what was found gets its own manifest first."""
    if read_manifest(manifest_path(found.path)) != found.manifest:
        write_manifest(found.path, found.manifest)
    folder = found.path.parent
    for part in [*folder.glob(f"*{PART}"), *folder.glob(f"*{PART}.json")]:
        part.unlink()
    for manifest in folder.glob("*.ckpt.json"):
        if not manifest.with_suffix("").exists():
            manifest.unlink()
