"""Several processes that make one run, as torchrun starts them: each trains on its share of every batch.

The batches, their order and their views do not depend on the number of ranks. Rank r takes the r-th part of each batch.
PyTorch's DistributedDataParallel (Li et al. 2020) averages the gradients. Only rank 0 writes files.

Without torchrun there is one rank, no process group exists, and every function here returns at once. "Collective" says
that every rank must call a function equally often, or the others wait for ever.
"""

import os
import warnings
from datetime import timedelta
from typing import Any, Callable, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd import BadInput, first_error
from kd.machine import ranks

T = TypeVar("T")
PATIENCE = timedelta(minutes=3)  # for ranks that do not come; torch's own limit is half an hour


def check_batch_size(batch_size: int) -> None:
    """Raise BadInput for a batch size that the ranks cannot share."""
    count = ranks.ranks()
    # The last batch of an epoch may be half as long. Each share of it still needs two samples, for BatchNorm.
    if count > 1 and (batch_size % count or batch_size < 4 * count):
        raise BadInput(f"--batch-size {batch_size}: {count} ranks need a multiple of {count}, of at least {4 * count}")


def join(device: torch.device) -> None:
    """Meet the other processes that torchrun started, if it started this one.

    Raises BadInput where they cannot meet, as when a port is in use or a host out of reach.
    """
    count = ranks.ranks()
    if count == 1 or dist.is_initialized():
        return
    # Numbers that the host decides by go through gloo, so that the host need not wait for the GPUs.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        # torchrun's store outlives the processes that it restarts, and would hand them the addresses of dead ones.
        # So each start writes under a name of its own, the restart count. Only the ranks of one machine count alike:
        # on several, start again by hand.
        store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group(backend, store=store, rank=ranks.rank(), world_size=count)
    except (RuntimeError, ValueError) as error:  # torch's own network errors are RuntimeErrors
        raise BadInput(f"the {count} ranks cannot meet at {os.environ.get('MASTER_ADDR')}:"
                       f"{os.environ.get('MASTER_PORT')}; start them by torchrun, with a host that all reach and a "
                       f"free port ({first_error(error)})") from error


def leave() -> None:
    """Part from the other ranks, at the end of a run that succeeded. Otherwise torch warns, and a peer may hang.

    Not after a failure: a rank that waits for others which are gone would then wait here.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """How many ranks there are; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def restarted() -> bool:
    """Whether torchrun has started this process again (--max-restarts), after one of the ranks died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "") not in ("", "0")


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Call `make` in rank 0. Every rank returns what it returned, or raises what it raised. Collective."""
    outcome: list[Any] = [None, None]       # value, exception
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def check_same_on_all_ranks(facts: dict[str, Any], free: set[str]) -> None:
    """Raise BadInput in every rank unless `facts` are the same in all; those in `free` may differ. Collective."""
    first, *others = _of_all_ranks(facts)
    for name in facts:
        for other, theirs in enumerate(others, 1):
            if name not in free and theirs[name] != first[name]:
                raise BadInput(f"--{name.replace('_', '-')}: rank 0 has {first[name]}, rank {other} has "
                               f"{theirs[name]}; start every rank with the same flags, data and weights")


def _of_all_ranks(mine: T) -> list[T]:
    """What each rank calls this with, in their order. Collective."""
    everyones = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyones, mine)
    return everyones


def rank_share(samples: np.ndarray) -> np.ndarray:
    """This rank's part of a batch of sample numbers. Parts differ by at most one sample.

    Raises BadInput where a rank would have fewer than two.
    """
    if len(samples) < 2 * world_size() > 2:
        raise BadInput(f"--dataset: {len(samples)} training pictures are too few for {world_size()} ranks; start fewer")
    return np.array_split(samples, world_size())[rank()]


def max_over_ranks(*numbers: int) -> list[int]:
    """The largest of each number over the ranks. Collective."""
    if world_size() == 1:
        return list(numbers)
    largest = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over the ranks. Collective."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= world_size()
    return value


def sum_over_ranks(count: int) -> int:
    """The sum of a count over the ranks. Collective."""
    return sum(_of_all_ranks(count))


def wrap(model: nn.Module) -> nn.Module:
    """`model` as DistributedDataParallel, whose backward averages the gradients over the ranks; one rank: `model`.

    Each rank keeps its own buffers while it trains, when BatchNorm does not read its running statistics. Those of rank
    0 are saved and evaluated (`broadcast_weights`). DDP would send them round at every forward, which only costs time.
    """
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 is renaming broadcast_buffers
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def broadcast_weights(model: nn.Module) -> nn.Module:
    """Give every rank the weights and buffers of rank 0. Collective."""
    if world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    return model


def gather(rows: np.ndarray, count: int) -> np.ndarray:
    """All rows in their order, `(count, ...)`, where each rank has every n-th: rank, rank + n, rank + 2·n, ...

    Rank 0 must have a row; another rank may have none. Collective.
    """
    if world_size() == 1:
        return rows
    everyones = _of_all_ranks(rows)
    everything = np.empty((count, *everyones[0].shape[1:]), rows.dtype)
    for other, theirs in enumerate(everyones):
        if len(theirs):
            everything[other::world_size()] = theirs
    return everything


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm in `model` take its mean and variance over the whole batch, on all ranks together.

    Raises BadInput where that cannot be had: torch's SyncBatchNorm works on CUDA only.
    """
    if device.type != "cuda":
        raise BadInput(f"--sync-bn: works on CUDA only, and the device is {device.type}; leave it out")
    from timm.layers import convert_sync_batchnorm
    return convert_sync_batchnorm(model)
