"""What trains in a second: a quiet trainer, and a DDPO that lets one look at what it did."""

import torch
from torch.utils.data import DataLoader

from rl4med_ddpo.datamodules.prompts import ISICPromptDataModule
from rl4med_ddpo.lightning_modules import DDPO, AttributeClassifier, AttributeMatch, DRaFT
from support.dermoscopy import CONDITIONS, PROMPTS
from support.trainers import quiet_trainer

TINY_NETWORKS = {
    "seed": 0,
    "image_size": 16,
    "vae_channels": (8, 16),
    "latent_channels": 4,
    "unet_channels": (16, 32),
    "text_width": 16,
}


class RecordedDDPO(DDPO):
    """DDPO that keeps its rollouts and advantages, and the weights and gradients of each step."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.rollouts, self.orders, self.given, self.steps_taken = [], [], [], []
        advantages = self.advantages

        def recorded(*args):
            self.given.append(advantages(*args))
            return self.given[-1]

        self.advantages = recorded

    def make_sampler(self):
        sampler = super().make_sampler()
        collect = sampler.collect

        def collected(batch, mine, epoch):
            self.orders.append(batch["index"][mine])
            self.rollouts.append(collect(batch, mine, epoch))
            return self.rollouts[-1]

        sampler.collect = collected
        return sampler

    def rescored(self, *args):
        self.rollouts[-1] = super().rescored(*args)
        return self.rollouts[-1]

    def on_before_optimizer_step(self, optimizer):
        weights = [p.detach().clone() for p in self.trained_parameters()]
        gradients = [p.grad.clone() for p in self.trained_parameters()]
        self.steps_taken.append((weights, gradients))


def tiny_ddpo(pipeline, classifiers, kind=RecordedDDPO, **options):
    defaults = {
        "pipeline": pipeline,
        "judge": classifiers["judge"],
        "reward": AttributeMatch(classifiers["reward"]),
        "steps": 4,
        "guidance": 3.0,
        "clip_range": 1e-2,
        "sample_batch": 8,
        "micro_batch": 8,
        # every group's ties are broken by its odd samples, so that many pairs train
        "std_floor": 0.01,
    }
    return kind(**(defaults | options))


def tiny_draft(pipeline, classifiers, kind=DRaFT, **options):
    defaults = {
        "pipeline": pipeline,
        "judge": classifiers["judge"],
        "reward": AttributeMatch(classifiers["reward"]),
        "steps": 4,
        "guidance": 3.0,
        "updates": 2,
        "sample_batch": 8,
        "micro_batch": 4,
    }
    return kind(**(defaults | options))


def prompts(samples=16, number=4, **options):
    """A few prompts, as different as they come."""
    chosen = [PROMPTS[i * 31 // (number - 1)] for i in range(number)]
    defaults = {
        "prompts": chosen,
        "samples_per_epoch": samples,
        "validation_samples_per_prompt": 0,
        "test_samples_per_prompt": 2,
    }
    return ISICPromptDataModule(**(defaults | options))


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def distance(one, other):
    """Largest difference between two states, relative to the largest weight."""
    assert one.keys() == other.keys()
    size = max(tensor.abs().max() for tensor in one.values())
    return max((one[k] - other[k]).abs().max() for k in one).item() / size.item()


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def fitted(path, backbone, attributes, seed):
    """The checkpoint of a classifier after one epoch of two batches of noise."""
    draw = torch.Generator().manual_seed(seed)
    batch = {
        "image": torch.rand(8, 3, 16, 16, generator=draw),
        "condition": CONDITIONS[:8],
        "prompt": list(PROMPTS[:8]),
        "id": [f"image_{i}" for i in range(8)],
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = AttributeClassifier(backbone, False, attributes, image_size=32, dropout=0.0)
        trainer = quiet_trainer(path.parent, max_epochs=1)
        trainer.fit(classifier, DataLoader([batch, batch], batch_size=None))
    trainer.save_checkpoint(path, weights_only=True)
    return str(path)
