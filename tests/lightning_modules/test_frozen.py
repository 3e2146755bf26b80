from copy import deepcopy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rl4med_ddpo.lightning_modules.networks.frozen import Frozen, omit_frozen


class Encoder(nn.Sequential):
    def __init__(self, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank update that is trained."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.base = nn.Linear(4, 1).requires_grad_(False)
            self.down = nn.Linear(4, 2, bias=False)
            self.up = nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Module(L.LightningModule):
    def __init__(self, seed: int = 0):
        super().__init__()
        self.save_hyperparameters()

    def configure_model(self):
        self.encoder = Frozen(Encoder(self.hparams.seed))
        self.head = Adapted(self.hparams.seed)
        omit_frozen(self.head)

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        return (self.head(self.encoder(batch[0])) - batch[1]).square().mean()


TRAINABLE = {"head.down.weight", "head.up.weight"}


def loader():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 3, generator=draw), torch.randn(16, 1, generator=draw)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def trained(path, epochs, ckpt_path=None, callbacks=()):
    L.seed_everything(0)
    module = Module()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        default_root_dir=path,
        callbacks=[*callbacks, ModelCheckpoint(path, "{epoch}", save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_checkpoint_holds_what_is_trained_and_nothing_else(tmp_path):
    trained(tmp_path, 1)
    assert (
        torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"].keys() == TRAINABLE
    )


def test_resumed_fit_equals_an_uninterrupted_one(tmp_path):
    trained(tmp_path, 1)
    resumed = trained(tmp_path, 2, tmp_path / "epoch=0.ckpt")
    assert equal(resumed, trained(tmp_path, 2))
    assert not equal(resumed.head, trained(tmp_path, 1).head)


def test_resumed_weight_average_equals_an_uninterrupted_one(tmp_path):
    def average():
        return EMAWeightAveraging(decay=0.5, update_starting_at_step=0)

    trained(tmp_path, 1, callbacks=[average()])
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == TRAINABLE
    resumed = average()
    trained(tmp_path, 2, tmp_path / "epoch=0.ckpt", callbacks=[resumed])
    whole = average()
    trained(tmp_path, 2, callbacks=[whole])
    assert equal(resumed._average_model, whole._average_model)


def test_load_from_checkpoint_is_strict_and_builds_the_frozen_part_itself(tmp_path):
    module = trained(tmp_path, 1)
    loaded = Module.load_from_checkpoint(tmp_path / "epoch=0.ckpt")
    assert equal(loaded, module)
    for kept, again in zip(module.buffers(), loaded.buffers(), strict=True):
        assert torch.equal(kept, again)


@pytest.mark.parametrize("name", sorted(TRAINABLE))
def test_missing_trainable_weights_are_an_error(tmp_path, name):
    trained(tmp_path, 1)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    del checkpoint["state_dict"][name]
    torch.save(checkpoint, tmp_path / "holes.ckpt")
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        Module.load_from_checkpoint(tmp_path / "holes.ckpt")


def test_unknown_weights_are_an_error(tmp_path):
    module = trained(tmp_path, 1)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict(module.state_dict() | {"head.other": torch.zeros(1)})


def test_deep_copy_stands_on_its_own_tensors():
    module = Module()
    module.configure_model()
    copy = deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert copy.state_dict().keys() == TRAINABLE
    copy.load_state_dict({name: torch.ones_like(p) for name, p in copy.state_dict().items()})
    assert copy.head.base.weight.abs().sum() > 0
    assert copy.encoder.module[0].weight.abs().sum() > 0
    assert copy.head.up.weight.eq(1).all()
    assert module.head.base.weight.eq(0).all()


def test_what_was_trainable_is_saved_even_while_it_is_switched_off():
    head = Adapted()
    omit_frozen(head)
    head.requires_grad_(False)
    assert head.state_dict().keys() == {"down.weight", "up.weight"}


def test_frozen_stays_in_eval_mode_and_without_gradients():
    frozen = Frozen(Encoder())
    nn.Sequential(frozen).train()
    assert not any(m.training for m in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    before = deepcopy(frozen.module[1].running_mean)
    x = torch.randn(5, 3)
    assert torch.equal(frozen(x), frozen(x))
    assert torch.equal(frozen.module[1].running_mean, before)


def test_frozen_computes_in_its_own_precision_inside_autocast():
    frozen, x = Frozen(Encoder()), torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = frozen(x.bfloat16())
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, frozen(x.bfloat16().float()))
    assert Frozen(Encoder(), torch.bfloat16)(x).dtype == torch.bfloat16


def test_gradients_pass_through_frozen_to_its_input():
    x = torch.randn(2, 3, requires_grad=True)
    Frozen(Encoder())(x).sum().backward()
    assert x.grad.abs().sum() > 0
