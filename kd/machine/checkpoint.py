"""Atomic, checksummed checkpoints: what is on disk is either whole or noticed.

A file is a magic word, the SHA-256 of the rest, and the rest: a `torch.save` payload that is read back with
`weights_only=True`, so nothing in it can run. It is written under a temporary name in the same folder, flushed to the
disk, and renamed over its place; the one before it stays as `.previous`.
"""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any, Callable

import torch

from kd import BadInput
from kd.machine import distributed
from kd.machine.files import write_atomic

MAGIC = b"kd-ckpt1"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings and containers of them) to `path`; the last one becomes `.previous`."""
    if distributed.rank():
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    write_atomic(path, MAGIC, hashlib.sha256(payload).digest(), payload, keep_previous=True)


def read(path: Path) -> dict[str, Any]:
    """The state in one file. Raises ValueError where it is truncated, altered, or holds more than plain data."""
    content = path.read_bytes()
    head, payload = content[:len(MAGIC) + 32], content[len(MAGIC) + 32:]
    if head != MAGIC + hashlib.sha256(payload).digest():
        raise ValueError(f"{path} is damaged: its checksum does not match")
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:  # a valid checksum, but not by our hand
        raise ValueError(f"{path} holds something else than tensors and numbers; not opened") from error


def load(path: Path, say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """The newest checkpoint that is whole: `path`, or else its `.previous`; None where there is neither.

    A damaged one is named in a line, and replaced by the one before it. Raises BadInput where both are damaged.
    """
    fault = ""
    for candidate in filter(Path.exists, (path, path.with_name(path.name + ".previous"))):
        try:
            state = read(candidate)
        except ValueError as error:
            fault = fault or str(error)
            continue
        if fault:
            say(f"{fault}; goes on from the checkpoint before it")
        candidate.replace(path)     # the next save keeps this one as `.previous`, not a damaged one
        return state
    if fault:
        raise BadInput(f"{fault}, and no other is whole; start again with --overwrite")
    return None
