"""Take files from the hub's cache if they are there, else over the network; or say why not.

What is in the cache is used without a question to the network, so a run does not change because
somebody changed a repository, and a machine without a network needs no setting.
"""

import os
import threading
from collections.abc import Callable
from queue import Empty, Queue
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError

from rl4med_ddpo.foundation.errors import UserError

PATIENCE = 4.0
"""Seconds in which the hub must answer a first, small question."""

Found = TypeVar("Found")


def from_cache_or_hub(
    fetch: Callable[[bool], Found], repo: str, revision: str | None, command: str, instead: str
) -> Found:
    """Return what `fetch` finds.

    Args:
        fetch: Called with `local_files_only`: True first, and False once the hub has answered.
        repo: The repository on the hub, `owner/name`.
        revision: Branch, tag or commit; None for the newest.
        command: What fetches the files where there is a network.
        instead: What else the user can do.

    Raises:
        UserError: if the files are not in the cache and the hub does not give them; within
            `PATIENCE` seconds where there is no network.
    """
    try:
        return fetch(True)
    except LocalEntryNotFoundError:
        pass
    try:
        # a download alone would repeat itself for most of a minute before it gives up
        run_with_timeout(
            PATIENCE, lambda: HfApi().model_info(repo, revision=revision, timeout=PATIENCE)
        )
        return fetch(False)
    except UserError:
        raise
    except Exception as error:
        name = repo if revision is None else f"{repo} at revision {revision}"
        raise UserError(
            f"{name} is not in the hub's cache of this machine, and the hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}).\n"
            f"  Fetch it where there is a network: {command}\n"
            f"  and set HF_HOME to that cache here (now {os.environ.get('HF_HOME', 'its default')})"
            f", or {instead}."
        ) from error


def run_with_timeout(seconds: float, ask: Callable[[], object]) -> None:
    """Ask in a thread of its own: resolving a name knows no time limit, nor do several tries."""
    outcome: Queue[BaseException | None] = Queue()

    def asked() -> None:
        try:
            ask()
        except Exception as error:
            outcome.put(error)
        else:
            outcome.put(None)

    threading.Thread(target=asked, daemon=True).start()
    try:
        error = outcome.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
