"""Several processes, one run: what torchrun starts, each with its share of every batch.

The batches, their order and their views are those of a single process, so that any number of ranks trains on the same
ones: rank r takes the r-th part of each batch, gradients are averaged by PyTorch's DistributedDataParallel (Li et al.
2020), and only rank 0 writes. Without torchrun every function here is the identity, and no process group exists.
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

from kd import BadInput

T = TypeVar("T")
PATIENCE = timedelta(minutes=3)  # with ranks that do not come; torch's own is half an hour


def join(device: torch.device, batch_size: int, accumulate: int) -> None:
    """Meet the other processes that torchrun started.

    Raises BadInput for a batch that they cannot share, and where they cannot meet: a port in use, a host out of reach.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    # half a batch, as the last of an epoch may be, still gives two samples to each part: BatchNorm needs them
    least = 4 * ranks * accumulate if ranks * accumulate > 1 else 2
    if batch_size % ranks or batch_size < least:
        raise BadInput(f"--batch-size {batch_size}: {ranks} ranks with --accumulate {accumulate} need a multiple of "
                       f"{ranks}, of at least {least}")
    if ranks > 1 and not dist.is_initialized():
        # numbers that the host decides by go through gloo, so that the GPUs need not be waited for
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, store=_store_of_this_start(), rank=int(os.environ["RANK"]),
                                    world_size=ranks)
        except (RuntimeError, ValueError) as error:  # torch's own network errors are RuntimeErrors
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise BadInput(f"the {ranks} ranks cannot meet at {place}; start them by torchrun, with a host that all "
                           f"reach and a free port ({str(error).splitlines()[0]})") from error


def _store_of_this_start() -> dist.Store:
    """Where the ranks find each other's addresses.

    torchrun's store outlives the processes that it starts again, and with it the addresses of those that died: so each
    start writes under a name of its own. Only a single agent counts them alike for all ranks; several must be started
    with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for that (pytorch/pytorch#135712).
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if alone else ''}", store)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def restarted() -> bool:
    """Whether torchrun has started this process again (--max-restarts), after one of the ranks died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """What `make` returns in rank 0, in every rank; or the exception that it raises there."""
    if world_size() == 1:
        return make()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = make()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def check_same_on_all_ranks(facts: dict[str, Any], free: set[str]) -> None:
    """Raise BadInput in every rank where `facts`, but for those in `free`, are not the same in all."""
    if world_size() == 1:
        return
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, facts)
    for name, value in facts.items():
        for other, theirs in enumerate(told):
            if name not in free and theirs[name] != told[0][name]:
                raise BadInput(f"--{name.replace('_', '-')}: rank 0 has {told[0][name]}, rank {other} has "
                               f"{theirs[name]}; start every rank with the same flags, data and weights")


def rank_share(samples: np.ndarray) -> np.ndarray:
    """This rank's part of a batch: of every batch, parts differ by one sample at the most. Raises BadInput."""
    if len(samples) < 2 * world_size() > 2:
        raise BadInput(f"--dataset: {len(samples)} training pictures are too few for {world_size()} ranks; start fewer")
    return np.array_split(samples, world_size())[rank()]


def max_over_ranks(*numbers: int) -> list[int]:
    """The largest of each number over the ranks; all of them must ask."""
    if world_size() == 1:
        return [int(number) for number in numbers]
    told = torch.tensor([int(number) for number in numbers])
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.tolist()


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over the ranks."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= world_size()
    return value


def sum_over_ranks(count: int) -> int:
    """The sum over the ranks."""
    if world_size() == 1:
        return count
    told = torch.tensor(count)
    dist.all_reduce(told)
    return int(told)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model whose backward averages gradients over the ranks.

    Buffers are each rank's own while it trains, when BatchNorm does not read them; what is saved and evaluated is
    rank 0's (`copy_first`). To send them round at every forward, as DDP does by default, would change nothing but time.
    """
    if world_size() == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames broadcast_buffers
        return nn.parallel.DistributedDataParallel(model, devices, broadcast_buffers=False,
                                                   gradient_as_bucket_view=True)


def sync_gradients(model: Any, now: bool) -> ContextManager:
    """Where a step has several parts, only the forward of the last (`now`) has its backward average the gradients:
    those of the others add up in each rank until then."""
    return contextlib.nullcontext() if now or world_size() == 1 else model.no_sync()


def broadcast_weights(model: nn.Module) -> nn.Module:
    """Give every rank rank 0's weights and buffers."""
    if world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    return model


def gather(rows: np.ndarray, count: int) -> np.ndarray:
    """Rows of samples rank, rank + world, rank + 2·world, ... of every rank, put back in order: `(count, ...)`.

    Rank 0 must have a row; another rank may have none.
    """
    if world_size() == 1:
        return rows
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, rows)
    everything = np.empty((count, *told[0].shape[1:]), rows.dtype)
    for other, theirs in enumerate(told):
        if len(theirs):
            everything[other::world_size()] = theirs
    return everything


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm in `model` take its mean and variance over the whole batch, on all ranks together.

    torch's own SyncBatchNorm computes on GPUs alone; elsewhere `_synchronised` does the same.
    """
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm
        return convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = functools.partial(_synchronised, module, module.forward)  # type: ignore[method-assign]
    return model


def _synchronised(norm: Any, alone: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """BatchNorm (Ioffe and Szegedy 2015) over the samples of all ranks; timm's BatchNormAct2d acts as well.

    The sums are reduced by an operation that has a gradient. Mean first and then squares about it, not E[x²] - E[x]²,
    which cancels.
    """
    if not norm.training or world_size() == 1:
        return alone(x)
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
    """`size` rows in `accumulate` runs of nearly equal length; none is empty."""
    cuts = [size * i // accumulate for i in range(accumulate + 1)]
    return [slice(a, b) for a, b in zip(cuts, cuts[1:]) if a < b]
