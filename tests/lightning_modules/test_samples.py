import pytest
import torch

from rl4med_ddpo.datamodules.images import to_eight_bits
from rl4med_ddpo.lightning_modules.samples import Samples, filled_rows


@pytest.mark.parametrize(
    ("n", "multiple", "rows"),
    [(1, 1, [0]), (3, 4, [0, 1, 2, 2]), (4, 4, [0, 1, 2, 3]), (5, 4, [0, 1, 2, 3, 4, 4, 4, 4])],
)
def test_a_batch_is_filled_with_its_last_row(n, multiple, rows):
    assert filled_rows(n, multiple) == rows


def test_eight_bits_are_the_nearest_and_white_stays_white():
    values = torch.tensor([0.0, 0.49 / 255, 0.51 / 255, 254.4 / 255, 254.6 / 255, 1.0])
    assert to_eight_bits(values).tolist() == [0, 0, 1, 254, 255, 255]
    everything = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_eight_bits(everything.float() / 255), everything)


@pytest.mark.parametrize("read", [True, False])
def test_selected_samples_keep_their_rows_together(read):
    number = torch.arange(4)
    samples = Samples(
        prompts=["a", "b", "c", "d"],
        names=["A", "B", "C", "D"],
        conditions=number.float().view(4, 1).expand(4, 6),
        index=number,
        noise_keys=number + 10,
        images=number.byte().view(4, 1, 1, 1).expand(4, 3, 2, 2),
        reward=number / 6,
        reward_logits=number.float().view(4, 1).expand(4, 6) if read else None,
        judge_logits=number.float().view(4, 1).expand(4, 4),
    )
    chosen = samples.select([3, 1])
    assert (chosen.prompts, chosen.names) == (["d", "b"], ["D", "B"])
    assert (chosen.reward_logits is not None) == read
    for name, tensor in vars(chosen).items():
        if isinstance(tensor, torch.Tensor):
            whole = getattr(samples, name)
            assert torch.equal(tensor, torch.stack([whole[3], whole[1]])), name
