"""Several processes that make one run, as torchrun starts them: each trains on its share of every batch.

The batches, their order and their views do not depend on the number of ranks. Rank r takes the r-th part of each batch.
PyTorch's DistributedDataParallel (Li et al. 2020) averages the gradients. Only rank 0 writes files.

Without torchrun there is one rank, no process group exists, and every function here returns at once. "Collective" says
that every rank must call a function equally often, or the others wait for ever.
"""

import contextlib
import functools
import os
import warnings
from datetime import timedelta
from typing import Any, Callable, ContextManager, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor, nn

from kd import BadInput, cli

T = TypeVar("T")
PATIENCE = timedelta(minutes=3)  # for ranks that do not come; torch's own limit is half an hour


def check_batch_size(batch_size: int, accumulate: int) -> None:
    """Raise BadInput for a batch size that the ranks, and the parts of --accumulate, cannot share."""
    ranks = cli.ranks()
    # The last batch of an epoch may be half as long. Each part of it still needs two samples, for BatchNorm.
    least = 4 * ranks * accumulate if ranks * accumulate > 1 else 2
    if batch_size % ranks or batch_size < least:
        raise BadInput(f"--batch-size {batch_size}: {ranks} ranks with --accumulate {accumulate} need a multiple of "
                       f"{ranks}, of at least {least}")


def join(device: torch.device) -> None:
    """Meet the other processes that torchrun started, if it started this one.

    Raises BadInput where they cannot meet, as when a port is in use or a host out of reach.
    """
    ranks = cli.ranks()
    if ranks > 1 and not dist.is_initialized():
        # Numbers that the host decides by go through gloo, so that the host need not wait for the GPUs.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, store=_store_of_this_start(), rank=cli.rank(), world_size=ranks)
        except (RuntimeError, ValueError) as error:  # torch's own network errors are RuntimeErrors
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise BadInput(f"the {ranks} ranks cannot meet at {place}; start them by torchrun, with a host that all "
                           f"reach and a free port ({str(error).splitlines()[0]})") from error


def _store_of_this_start() -> dist.Store:
    """Where the ranks find each other's addresses.

    torchrun's store outlives the processes that it restarts. It would hand them the addresses of dead ones, so each
    start writes under a name of its own. That name is the restart count, which only a single agent counts alike for
    all ranks. Several agents must run with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (pytorch/pytorch#135712).
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if alone else ''}", store)


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
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Call `make` in rank 0. Every rank returns what it returned, or raises what it raised. Collective."""
    if world_size() == 1:
        return make()
    outcome: list[Any] = [None, None]       # value, exception
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def check_same_on_all_ranks(facts: dict[str, Any], free: set[str]) -> None:
    """Raise BadInput in every rank unless `facts` are the same in all; those in `free` may differ. Collective."""
    if world_size() == 1:
        return
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, facts)
    for name in facts:
        for other, theirs in enumerate(gathered):
            if name not in free and theirs[name] != gathered[0][name]:
                raise BadInput(f"{cli.option_of(name)}: rank 0 has {gathered[0][name]}, rank {other} has "
                               f"{theirs[name]}; start every rank with the same flags, data and weights")


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
        return [int(number) for number in numbers]
    largest = torch.tensor([int(number) for number in numbers])
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
    if world_size() == 1:
        return count
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` as DistributedDataParallel, whose backward averages the gradients over the ranks; one rank: `model`.

    Each rank keeps its own buffers while it trains, when BatchNorm does not read its running statistics. Those of rank
    0 are saved and evaluated (`broadcast_weights`). DDP would send them round at every forward, which only costs time.
    """
    if world_size() == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 is renaming broadcast_buffers
        return nn.parallel.DistributedDataParallel(model, devices, broadcast_buffers=False,
                                                   gradient_as_bucket_view=True)


def sync_gradients(model: Any, now: bool) -> ContextManager:
    """The context of a part's forward: DDP's `no_sync` unless `now`.

    Without it every part would average its gradients over the ranks. With it they add up in each rank, and are
    averaged once a step.
    """
    return contextlib.nullcontext() if now or world_size() == 1 else model.no_sync()


def broadcast_weights(model: nn.Module) -> nn.Module:
    """Give every rank the weights and buffers of rank 0. Collective."""
    if world_size() == 1:
        return model
    tensors = list(model.state_dict().values())
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):     # one broadcast for each, not for each tensor
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        dist.broadcast(flat, 0)
        for tensor, values in zip(alike, flat.split([tensor.numel() for tensor in alike])):
            tensor.copy_(values.view(tensor.shape))
    return model


def gather(rows: np.ndarray, count: int) -> np.ndarray:
    """All rows in their order, `(count, ...)`, where each rank has every n-th: rank, rank + n, rank + 2·n, ...

    Rank 0 must have a row; another rank may have none. Collective.
    """
    if world_size() == 1:
        return rows
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, rows)
    everything = np.empty((count, *gathered[0].shape[1:]), rows.dtype)
    for other, theirs in enumerate(gathered):
        if len(theirs):
            everything[other::world_size()] = theirs
    return everything


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm in `model` take its mean and variance over the whole batch, on all ranks together.

    torch's own SyncBatchNorm works only on GPUs. Elsewhere `_synchronised` computes the same.
    """
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm
        return convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = functools.partial(_synchronised, module, module.forward)  # type: ignore[method-assign]
    return model


def _synchronised(norm: Any, local_forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """BatchNorm (Ioffe and Szegedy 2015) over the samples of all ranks, with the activation of timm's BatchNormAct2d.

    The reduction over ranks has a gradient. The mean is taken first, then the squares about it: E[x²] - E[x]² would
    lose digits by cancellation.
    """
    if not norm.training or world_size() == 1:
        return local_forward(x)
    reduce = torch.distributed.nn.functional.all_reduce
    axes, shape = (0, *range(2, x.dim())), (1, -1, *(1,) * (x.dim() - 2))
    values = x.float()
    sums = reduce(torch.cat([values.sum(axes), values.new_full((1,), values.numel() / values.shape[1])]))
    count = sums[-1].detach()
    centred = values - (sums[:-1] / count).view(shape)
    variance = reduce(centred.square().sum(axes)) / count
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(sums[:-1] / count, norm.momentum)
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
    y = centred * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.affine:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    y = y.to(x.dtype)
    if hasattr(norm, "act"):
        y = norm.act(norm.drop(y))
    return y


def split_batch(size: int, accumulate: int) -> list[slice]:
    """`size` rows as `accumulate` slices of nearly equal length; as fewer ones where a slice would have a single row.

    BatchNorm needs two.
    """
    count = max(1, min(accumulate, size // 2))
    cuts = [size * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in zip(cuts, cuts[1:])]
