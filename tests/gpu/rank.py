"""One rank on a GPU: `torchrun ... -m tests.gpu.rank FOLDER train.py's flags`.

Several ranks make a run of train.py; each leaves FOLDER/losses.RANK.json, the mean loss of each step. A single rank
meets itself through NCCL and makes one step with and one without DistributedDataParallel.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tests.gpu import DEVICE, stand_ins


def alone() -> None:
    """The collectives that a run uses, over a process group of one."""
    backend = "gloo" if DEVICE.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, device_id=None if DEVICE.type == "cpu" else torch.device("cuda", 0))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 3)).to(DEVICE)
    x, gradients = torch.randn(4, 3, 8, 8, device=DEVICE), []
    devices = None if DEVICE.type == "cpu" else [0]
    for model in (plain, nn.parallel.DistributedDataParallel(plain, devices, gradient_as_bucket_view=True)):
        plain.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in plain.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert len(gradients[0]) == 6

    numbers = torch.arange(3.0, device=DEVICE)      # over NCCL
    dist.all_reduce(numbers)
    dist.broadcast(numbers, 0)
    host = torch.tensor([1, 2])                     # over gloo
    dist.all_reduce(host, dist.ReduceOp.MAX)
    assert numbers.tolist() == [0, 1, 2] and host.tolist() == [1, 2]
    dist.destroy_process_group()


def main(folder: str, flags: list[str]) -> None:
    stand_ins.install()
    from kd import cli
    if cli.ranks() == 1:
        alone()
        return
    import train
    from kd.machine import distributed
    losses: list[float] = []
    real = train.train_step

    def noted(*arguments):
        loss, norm = real(*arguments)
        losses.append(distributed.mean_over_ranks(loss).item())
        return loss, norm

    train.train_step = noted
    cli.run(train.main, cli.parse_config(train.Config, train.RECIPES, flags, ""))
    Path(folder, f"losses.{cli.rank()}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
