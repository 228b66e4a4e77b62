"""Several processes with unequal shards give the importance of one process with all samples."""

import pytest
import torch
from torch import nn

from mas_embed import UserError, estimate_importance, estimate_local_importance


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(7, 3, dtype=torch.float64)


def work(rank, shards, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(shards)
    )
    model, inputs = build()
    batches = [inputs[i : i + 1] for i in shards[rank]]
    for name, estimate in (("exact", estimate_importance), ("local", estimate_local_importance)):
        importance = estimate(model, batches)
        torch.save(dict(importance) | {"num_samples": importance.num_samples}, f"{folder}/{name}{rank}.pt")
    with pytest.raises(UserError, match="batches is empty"):
        estimate_importance(model, [])
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shards", [[range(5), range(5, 7)], [range(7), []]], ids=["unequal", "one empty"])
def test_two_processes_equal_one(shards, tmp_path):
    torch.multiprocessing.spawn(work, (shards, str(tmp_path)), nprocs=2)
    model, inputs = build()
    for name, estimate in (("exact", estimate_importance), ("local", estimate_local_importance)):
        expected = estimate(model, [inputs])
        for rank in range(2):
            importance = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            assert importance.pop("num_samples") == 7
            for parameter, value in importance.items():
                torch.testing.assert_close(value, expected[parameter], rtol=1e-10, atol=1e-14)
