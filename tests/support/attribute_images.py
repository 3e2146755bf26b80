"""Images whose attributes anyone can see: each lights up a cell of its own."""

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from support.dermoscopy import CONDITIONS, PROMPTS

CELL = 8


class AttributeImages(Dataset):
    """Images `(3, 16, 24)`: the attribute of column a brightens the a-th of six 8 x 8 cells."""

    def __init__(self, n: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(len(CONDITIONS), (n,), generator=draw)
        self.conditions = CONDITIONS[self.rows]
        cells = self.conditions.view(n, 2, 3) * 0.5
        pattern = cells.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2).unsqueeze(1)
        self.images = (pattern + 0.4 * torch.rand((n, 3, 2 * CELL, 3 * CELL), generator=draw)) / 2

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor | str]:
        return {
            "image": self.images[i],
            "condition": self.conditions[i],
            "prompt": PROMPTS[self.rows[i]],
            "id": f"image_{i}",
        }


class AttributeImageData(L.LightningDataModule):
    def __init__(self, train: int = 512, val: int = 128, batch_size: int = 32) -> None:
        super().__init__()
        self.sets = {"train": AttributeImages(train, 0), "val": AttributeImages(val, 1)}
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sets["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.sets["val"], self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.sets["val"], self.batch_size)
