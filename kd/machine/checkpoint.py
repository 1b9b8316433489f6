"""Atomic, checksummed checkpoints: what is on disk is either whole or noticed.

A file is a magic word, the SHA-256 of the rest, and the rest: a `torch.save` payload that is read back with
`weights_only=True`, so nothing in it can run. It is written under a temporary name in the same folder, flushed to the
disk, and renamed over its place; the one before it stays as `.previous`.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, Callable

import torch

from kd import BadInput
from kd.machine import distributed
from kd.machine.files import write_atomic

MAGIC = b"kd-ckpt1"
# what a run leaves behind, and --overwrite removes: never a whole folder, in case it is not one of ours
RUN_FOLDERS = ("student", "teacher", "control", "tensorboard")
RUN_FILES = ("last.ckpt", "last.ckpt.previous", "metrics.jsonl", "result.json", "predictions.npz",
             "report.html")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings and containers of them) to `path`; the last one becomes `.previous`."""
    if distributed.rank():
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write_atomic(path, MAGIC + hashlib.sha256(payload).digest() + payload, keep_previous=True)


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

    A damaged file is kept for inspection as `.damaged`, and `say` gets one line. Raises BadInput where both are
    damaged.
    """
    damaged = []
    for candidate in (path, path.with_name(path.name + ".previous")):
        if candidate.exists():
            try:
                return read(candidate)
            except ValueError as error:
                kept = candidate.with_name(candidate.name + ".damaged")
                os.replace(candidate, kept)
                damaged.append(kept)
                say(f"{error}; kept as {kept.name}")
    if damaged:
        raise BadInput(f"{path}: no checkpoint is whole ({', '.join(str(one) for one in damaged)}); start again with "
                       f"--overwrite")
    return None


def finished(out: Path, state: dict[str, Any] | None) -> dict[str, Any] | None:
    """The result of a run that has nothing left to do; one that lacks its page alone goes on from its checkpoint."""
    result = out / "result.json"
    if result.exists() and ((out / "report.html").exists() or state is None):
        return json.loads(result.read_text())
    return None


def check_facts(state: dict[str, Any], facts: dict[str, str]) -> None:
    """Raise BadInput where a resumed run meets other data, weights or precision than it began with.

    facts: by the name of the flag that stands for each; a new run's are put into `state`.
    """
    for name, value in state.setdefault("facts", facts).items():
        if facts[name] != value:
            raise BadInput(f"--resume: what --{name.replace('_', '-')} stands for has changed since the run began; "
                           f"give it as it was, or start again with --overwrite")


def _sweep(out: Path) -> None:
    """Remove what a killed process was writing: its temporary files, and saved folders that were not swapped in."""
    for path in [*out.glob(".*.tmp"), *out.glob("*/.*.tmp")]:
        path.unlink()
    for name in RUN_FOLDERS:
        if (out / f".{name}.old").exists() and not (out / name).exists():  # killed between the two renames
            (out / f".{name}.old").rename(out / name)
        for leftover in (out / f".{name}.new", out / f".{name}.old"):
            shutil.rmtree(leftover, ignore_errors=True)


def open_run(out: Path, config: dict[str, Any], free: set[str], resume: bool, overwrite: bool,
             ) -> dict[str, Any] | None:
    """Make the folder of a run, if need be; return its checkpoint under `resume`, else None.

    What makes it a run is its config.json, which the caller writes once the data and the models are known to be good.
    Raises BadInput where the folder holds another run and neither `resume` nor `overwrite` is given, where it holds
    something else, and where a resumed run has another setting (other than those in `free`).
    """
    record = out / "config.json"
    try:
        if out.exists() and any(path for path in out.iterdir() if not path.match(".config.json.*.tmp")):
            if not record.is_file():
                raise BadInput(f"--out {out}: holds files that are not a run; give another folder")
            if resume or overwrite:
                _sweep(out)
            if resume:
                before = json.loads(record.read_text())
                changed = [f"--{name.replace('_', '-')} {value} (was {before.get(name)})"
                           for name, value in config.items() if name not in free and before.get(name) != value]
                if changed:
                    raise BadInput(f"--resume: another setting makes another run: {', '.join(changed)}")
                return load(out / "last.ckpt")
            if not overwrite:
                raise BadInput(f"--out {out}: holds another run; go on with --resume, replace it with --overwrite, or "
                               f"give another folder")
            for name in RUN_FOLDERS:
                shutil.rmtree(out / name, ignore_errors=True)
            for name in RUN_FILES:
                (out / name).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        _sweep(out)
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}; give a folder that can be written") from error
    except ValueError as error:
        raise BadInput(f"{record}: not readable ({error}); replace the run with --overwrite") from error
    return None
