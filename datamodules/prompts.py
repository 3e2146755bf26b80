"""The prompts that DDPO samples from, as batches for all processes together."""

from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.datamodules.vocabulary import Vocabulary
from rl4med_ddpo.foundation.errors import UserError, name_few

PromptBatch = dict[str, list[str] | Tensor]


def prompt_batch(rows: Tensor, vocabulary: Vocabulary, first: int = 0) -> PromptBatch:
    """Make the batch of some prompts, whose samples are numbered from `first` on.

    Args:
        rows: Which of the vocabulary's prompts each is, `(M,)` int64.
        vocabulary: What the prompts are.
        first: Global index of the first sample.

    Returns:
        `prompt`, M texts, and `name`, their short names; `prompt_id`, `(M,)` int64; `condition`,
        multi-hot `(M, A)`; `index`, the global sample indices, `(M,)` int64.
    """
    return {
        "prompt": [vocabulary.prompts[row] for row in rows.tolist()],
        "name": [vocabulary.names[row] for row in rows.tolist()],
        "prompt_id": rows,
        "condition": vocabulary.conditions[rows],
        "index": torch.arange(first, first + len(rows)),
    }


class PromptLoader:
    """Yield prompts in chunks, the same to every process.

    It is no `DataLoader` on purpose: Lightning would hand each process a part of one.

    Args:
        vocabulary: What the prompts are.
        draw: Gives which of its prompts to yield, `(M,)` int64, when an epoch begins.
        n: M.
        chunk_size: Most prompts in a batch.
    """

    def __init__(
        self, vocabulary: Vocabulary, draw: Callable[[], Tensor], n: int, chunk_size: int
    ) -> None:
        self.vocabulary = vocabulary
        self.draw = draw
        self.n = n
        self.chunk_size = chunk_size

    def __len__(self) -> int:
        return -(-self.n // self.chunk_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        rows = self.draw()
        for first in range(0, self.n, self.chunk_size):
            yield prompt_batch(rows[first : first + self.chunk_size], self.vocabulary, first)


class ISICPromptDataModule(ISICDataModule):
    """Prompts to sample images for: one batch, of all processes together, for each epoch of DDPO.

    Args:
        root: Folder of ISIC 2019, needed for `prompts: train` and for the real images only.
        prompts: `balanced` over all of the vocabulary; `train`, as frequent as in the training
            split and drawn again in each epoch; or a list of prompts, balanced over it.
        samples_per_epoch: Images sampled in an epoch, by all processes together; a multiple of the
            number of prompts, unless they are drawn from the training split. Paper: 256.
        validation_samples_per_prompt: Images sampled for each prompt in a validation; 0 for none.
        test_samples_per_prompt: The same for testing and predicting. Paper: 960.
        eval_batch_size: Most prompts in a batch of validation, for all processes together; bounds
            the memory.
        predict_batch_size: Images that testing and predicting draw and write at a time, on one
            process; a multiple of the model's sample_batch, or that.
        **kwargs: How to read the real images, see `ISICDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        prompts: Literal["balanced", "train"] | list[str] = "balanced",
        samples_per_epoch: int = 256,
        validation_samples_per_prompt: int = 4,
        test_samples_per_prompt: int = 960,
        eval_batch_size: int = 256,
        predict_batch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.draws_from_train = prompts == "train"
        if self.draws_from_train and root is None:
            raise UserError("prompts=train takes the prompts of the training images: give root.")
        everyone = self.vocabulary.prompts
        given = [prompts] if isinstance(prompts, str) else prompts
        chosen = everyone if prompts in ("balanced", "train") else given
        self.rows = _rows_of(chosen, self.vocabulary)
        least = {
            "samples_per_epoch": (samples_per_epoch, 1),
            "validation_samples_per_prompt": (validation_samples_per_prompt, 0),
            "test_samples_per_prompt": (test_samples_per_prompt, 1),
            "eval_batch_size": (eval_batch_size, 1),
            "predict_batch_size": (predict_batch_size, 1),
        }
        for name, (given, minimum) in least.items():
            if given < minimum:
                raise UserError(f"{name} must be at least {minimum}, it is {given}.")
        if not self.draws_from_train:
            _check_balance(samples_per_epoch, len(self.rows))
        self.samples_per_epoch = samples_per_epoch
        self.validation_samples_per_prompt = validation_samples_per_prompt
        self.test_samples_per_prompt = test_samples_per_prompt
        self.eval_batch_size = eval_batch_size
        self.predict_batch_size = predict_batch_size

    @property
    def prompts(self) -> list[str]:
        """All that samples are drawn for."""
        return [self.vocabulary.prompts[row] for row in self.rows.tolist()]

    @property
    def samples_per_prompt(self) -> int | None:
        """Images of each prompt in an epoch; None where the prompts are drawn."""
        return None if self.draws_from_train else self.samples_per_epoch // len(self.rows)

    def contents(self) -> dict[str, str]:
        """Name the tables by their content, if the prompts are drawn from them."""
        return super().contents() if self.draws_from_train else {}

    def setup(self, stage: str) -> None:
        """Read the tables, if the prompts are drawn from them."""
        if stage == "fit" and self.draws_from_train:
            rows = self.splits.train[list(self.vocabulary.attributes)].astype(int)
            keys = rows.itertuples(index=False, name=None)
            self.train_rows = np.array([self.vocabulary.keys.index(key) for key in keys])

    def train_dataloader(self) -> PromptLoader:
        """Yield the one batch of the current epoch."""
        return PromptLoader(
            self.vocabulary, self._draw, self.samples_per_epoch, self.samples_per_epoch
        )

    def val_dataloader(self) -> PromptLoader | list[PromptLoader]:
        """Yield each prompt `validation_samples_per_prompt` times; no loader at all for 0."""
        n = self.validation_samples_per_prompt
        return self.eval_loader(n, self.eval_batch_size) if n else []

    def test_dataloader(self) -> PromptLoader:
        """Yield each prompt `test_samples_per_prompt` times."""
        return self.eval_loader(self.test_samples_per_prompt, self.predict_batch_size)

    def predict_dataloader(self) -> PromptLoader:
        """Yield the same prompts as for testing, in the same batches."""
        return self.eval_loader(self.test_samples_per_prompt, self.predict_batch_size)

    def _draw(self) -> Tensor:
        if not self.draws_from_train:
            return self._balanced(self.samples_per_epoch)
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        rng = np.random.default_rng([self.seed, epoch])
        return torch.from_numpy(rng.choice(self.train_rows, self.samples_per_epoch))

    def _balanced(self, n: int) -> Tensor:
        """Return n rows, each prompt in turn, so that a greater n leaves the first ones as is."""
        return self.rows[torch.arange(n) % len(self.rows)]

    def eval_loader(self, samples_per_prompt: int, chunk_size: int) -> PromptLoader:
        """Yield each prompt so many times, in batches of at most `chunk_size`."""
        n = samples_per_prompt * len(self.rows)
        return PromptLoader(self.vocabulary, lambda: self._balanced(n), n, chunk_size)


def _rows_of(prompts: Sequence[str], vocabulary: Vocabulary) -> Tensor:
    known = vocabulary.prompts
    unknown = [prompt for prompt in prompts if prompt not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, n=1, cutoff=0)
        raise UserError(
            f"{len(unknown):,} of the {len(prompts):,} prompts are not among the {len(known)}: "
            f"{name_few(map(repr, unknown))}.\n  The nearest to the first is {near[0]!r}."
        )
    twice = sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})
    if twice or not prompts:
        what = f"holds a prompt twice: {name_few(map(repr, twice))}" if twice else "is empty"
        raise UserError(
            f"the list of prompts {what}.\n  Give each prompt once; all get equal shares."
        )
    return torch.tensor([vocabulary.prompt_id(prompt) for prompt in prompts])


def _check_balance(samples_per_epoch: int, n_prompts: int) -> None:
    below = samples_per_epoch // n_prompts * n_prompts
    if below != samples_per_epoch:
        works = f"{below} and {below + n_prompts}" if below else f"{n_prompts}"
        raise UserError(
            f"samples_per_epoch={samples_per_epoch} is no multiple of the {n_prompts} prompts.\n"
            f"  Nearest that works: {works}."
        )
