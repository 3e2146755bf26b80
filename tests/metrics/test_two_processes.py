import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rl4med_ddpo.metrics.apr import ArtifactPrevalenceRate
from rl4med_ddpo.metrics.attribute_scores import AttributeScores
from support.dermoscopy import ARTIFACTS, CONDITIONS


def images():
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(32, (60,), generator=draw)
    conditions = CONDITIONS[rows][:, :4]
    return torch.randn(60, 4, generator=draw) + conditions, conditions, rows


def measure(shares):
    logits, conditions, rows = images()
    rate, scores = ArtifactPrevalenceRate(32), AttributeScores(ARTIFACTS)
    for share in shares:
        rate.update(logits[share], conditions[share], rows[share])
        scores.update(logits[share], conditions[share].long())
    return rate.compute()._asdict() | scores.compute()


def one_rank(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shares = [slice(0, 41)] if rank == 0 else [slice(41, 55), slice(55, 60)]
    torch.save(measure(shares), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_uneven_shares_of_two_processes_give_the_scores_of_one(tmp_path):
    # forked, for a spawned process spends half a minute on imports
    mp.start_processes(one_rank, (tmp_path / "store", tmp_path), nprocs=2, start_method="fork")
    whole = measure([slice(0, 60)])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, msg=name)
