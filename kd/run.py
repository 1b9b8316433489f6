"""A run: its folder, position, checkpoint, log, signals and ranks.

Run may know disks, signals and ranks; never a loss, a batch or a forward pass. Otherwise it would become the Trainer
that this project exists to avoid. What there is to learn stands in train.py.
"""

import contextlib
import json
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Protocol

import safetensors
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from kd import BadInput, cli, models, one_line
from kd.features import merge_head
from kd.machine import checkpoint, devices, distributed, runtime
from kd.machine.files import write_atomic
from kd.machine.health import Guard
from kd.machine.records import Records
from kd.machine.signals import Stop, Stopped

# What a run leaves behind, and --overwrite removes: never a whole folder, in case it holds something else as well.
# The order is that of removal. After a kill in between, the result never stands for files that are gone, and no
# checkpoint looks for them.
RUN_FILES = ("result.json", "last.ckpt.previous", "last.ckpt", "metrics.jsonl", "predictions.npz", "report.html")
RUN_FOLDERS = ("student", "teacher", "control", "tensorboard")
# In this folder torchrun has not begun a run yet. Ranks that it restarts must not resume the run that lies there.
NOT_BEGUN = ".not-begun.tmp"
LOCK = ".lock"      # held by the process that trains in this folder


class _Locked(threading.local):
    """What each thread has locked."""

    def __init__(self) -> None:
        self.by_folder: dict[Path, FileLock] = {}


_locked = _Locked()


class Flushable(Protocol):
    """Something with unwritten bytes, such as a logit store."""

    def flush(self) -> None: ...


class Saved(Protocol):
    """Something that a checkpoint can hold, such as a model or an optimizer."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Clock:
    """Seconds of work, over all processes of a run; paused while the run saves or validates."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds                  # until the last start
        self._since: float | None = None        # when it was started; None while paused

    @property
    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        self._since = time.monotonic() if self._since is None else self._since

    def pause(self) -> bool:
        """Stop counting; returns whether it was counting."""
        running = self._since is not None
        self._before, self._since = self.seconds, None
        return running


# what older checkpoints call the fields of a position
RENAMED = {"best": "kept_accuracy", "best_epoch": "kept_epoch"}


@dataclass
class Position:
    """Where a training stands. With the weights and the optimizer, this is all that a resumed run needs."""

    role: str                       # "teacher", "control" or "student"
    loss_sum: Tensor                # scalar on the device, float64 if it can: of this epoch, over this rank's steps
    epoch: int = 0                  # epochs that are complete
    step: int = 0                   # steps of the next one that are done
    kept_accuracy: float = -1.0     # on validation, of the weights that are kept: of the best epoch, or of the last
    kept_epoch: int = 0             # and their epoch, counted from 1
    clock: Clock = field(default_factory=Clock)     # seconds of training in this epoch

    def next_epoch(self) -> None:
        """The epoch is complete: the next one begins at its first step."""
        self.epoch, self.step, self.clock = self.epoch + 1, 0, Clock()
        self.loss_sum.zero_()


class Run:
    """One run, in `out`. Every rank has one; only rank 0 writes."""

    def __init__(self, out: Path, settings: Mapping[str, Any], free: set[str], save_minutes: float = 10.0,
                 resume: bool = False, overwrite: bool = False, defaults: Mapping[str, Any] = {}) -> None:
        """Open the folder of a run. `stop.install()` then lets signals stop it.

        settings: recorded and compared, never interpreted; `free` names those that a resumed run may change.
        defaults: what a setting was in a run that is older than the setting.
        overwrite: replace the run in the folder; `write_config` does so, and until then the folder stays as it is.
        Raises BadInput where the folder holds another run, something else, or a run with other settings.
        """
        self.out, self.settings, self.free, self.save_minutes = out, settings, free, save_minutes
        self.commit = runtime.commit()      # of the code that runs, read before anybody changes it
        restarted = bool(distributed.max_over_ranks(distributed.restarted())[0])
        opened = distributed.broadcast_from_rank0(
            lambda: open_folder(out, settings, free, resume, overwrite, restarted, defaults))
        self._replaces = opened.replaces
        self.finished = opened.finished     # the result of a run that has nothing left to do, else None

        saved = opened.checkpoint or {}
        self.history: list[dict[str, Any]] = saved.pop("history", [])   # an entry an epoch
        self.roles_done: list[str] = saved.pop("roles_done", [])
        self.facts: dict[str, str] = saved.pop("facts", {})
        self.arithmetic: str = saved.pop("arithmetic", "")
        self._began = time.monotonic() - saved.pop("seconds", 0.0)
        self._saved_training = saved        # of the role that was under way, until `restore` takes it up
        # what is under way: set by `restore`, saved by `save`, over after `mark_done`
        self._position: Position | None = None
        self._saved: Mapping[str, Saved] = {}
        self._guard: Guard | None = None
        self._flush_first: list[Flushable] = []
        self._last_save = time.monotonic()
        self._records = Records(out)
        self.stop = Stop()

    @property
    def seconds(self) -> float:
        """Wall time of the run, including the processes before a resume."""
        return time.monotonic() - self._began

    # ---- is it the same run? ------------------------------------------------------------------------------

    def must_match(self, **facts: str) -> None:
        """Compare what the settings stand for, such as dataset="<its digest>". Collective.

        Raises BadInput where ranks differ in that or in a setting, or where a resumed run meets other data, weights or
        precision than it began with.
        """
        distributed.check_same_on_all_ranks({**self.settings, **facts}, self.free)
        self.facts = self.facts or facts
        for name, value in self.facts.items():
            # Older runs recorded random weights, which are "none" now.
            if facts[name] not in (value, "none"):
                raise BadInput(f"--resume: what {cli.option_of(name)} stands for has changed since the run "
                               f"began; give it as it was, or start again with --overwrite")

    def write_config(self, **facts: Any) -> None:
        """Write config.json, which makes the folder a run. Called once data and models are found to be good.

        Under `overwrite` the run that the folder held is removed first. facts: what config.json holds beside the
        settings. Collective: no rank goes on before the old run is gone. Raises BadInput where it cannot be removed.
        """
        def write() -> None:
            if self._replaces:
                remove_run(self.out)
            write_atomic(self.out / "config.json", json.dumps({**self.settings, **facts}, indent=2).encode())
            (self.out / NOT_BEGUN).unlink(missing_ok=True)

        distributed.broadcast_from_rank0(write)

    def computes_with(self, arithmetic: str) -> None:
        """Say so where a resumed run goes on with other arithmetic than before, and therefore not to the bit.

        arithmetic: the device, the precision and the kernels, in words.
        """
        if self.arithmetic not in ("", arithmetic):
            print(f"--resume: computed with {self.arithmetic} until here, and with {arithmetic} from here on: the "
                  f"result is not the same to the bit")
        self.arithmetic = arithmetic

    # ---- position and checkpoint ---------------------------------------------------------------------------

    def restore(self, role: str, saved: Mapping[str, Saved], guard: Guard, device: torch.device) -> Position:
        """The position of this role's training: its start, or where the checkpoint was.

        saved: what a checkpoint holds besides the position, by name; filled from it in a resumed run. The run remembers
        all of it: from now on `save` saves it, and a signal does so before the run stops. guard: asked before a save.
        """
        position = Position(role, torch.zeros((), dtype=devices.widest_float(device), device=device))
        if "position" in self._saved_training:
            checkpoint_content, self._saved_training = self._saved_training, {}
            for name, thing in saved.items():
                thing.load_state_dict(checkpoint_content[name])
            values = {RENAMED.get(name, name): value for name, value in checkpoint_content["position"].items()}
            position.loss_sum.fill_(values.pop("loss_sum"))
            position.clock = Clock(values.pop("train_seconds"))
            for name, value in values.items():
                setattr(position, name, value)
        self._position, self._saved, self._guard = position, saved, guard
        self._last_save = time.monotonic()
        return position

    def flush_before_save(self, store: Flushable) -> None:
        """Have `store` write its bytes before each checkpoint."""
        self._flush_first.append(store)

    def save_is_due(self) -> bool:
        """Whether a signal came to any rank, or --save-minutes have passed. Collective."""
        late = time.monotonic() - self._last_save > 60 * self.save_minutes
        return any(distributed.max_over_ranks(self.stop.signal, late))

    def save(self) -> None:
        """Write the checkpoint. Collective.

        Raises TrainingFault where a weight is not finite or the disk is full, and Stopped after a signal.
        """
        assert self._position and self._guard
        position = self._position
        self._guard.check()                 # a NaN must never reach the disk
        running = position.clock.pause()
        for store in self._flush_first:
            store.flush()
        checkpoint.save(self.out / "last.ckpt", {
            "history": self.history, "roles_done": self.roles_done, "facts": self.facts,
            "arithmetic": self.arithmetic, "seconds": self.seconds,
            "position": {"role": position.role, "epoch": position.epoch, "step": position.step,
                         "loss_sum": distributed.mean_over_ranks(position.loss_sum).item(),
                         "train_seconds": position.clock.seconds, "kept_accuracy": position.kept_accuracy,
                         "kept_epoch": position.kept_epoch},
            **{name: thing.state_dict() for name, thing in self._saved.items()}})
        self._last_save = time.monotonic()
        # the ranks meet here, so that the logits of all of them are on the disk before any goes on
        self._raise_if_stopped()
        if running:
            position.clock.start()

    def stop_if_requested(self) -> None:
        """After a signal to any rank: save a training that is under way, then raise Stopped. Collective."""
        if distributed.max_over_ranks(self.stop.signal)[0]:
            if self._position:
                self.save()
            self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        if number := distributed.max_over_ranks(self.stop.signal)[0]:
            raise Stopped(number)

    # ---- log and roles -------------------------------------------------------------------------------------

    def log(self, entry: dict[str, Any]) -> None:
        """Add an epoch to the history, metrics.jsonl and TensorBoard."""
        self.history.append({**entry, "time": time.time(), "elapsed": self.seconds})
        self._records.write(self.history)

    def done(self, role: str) -> bool:
        """Whether this role's training is complete."""
        return role in self.roles_done

    def mark_done(self, role: str) -> None:
        """This role's training is complete; there is nothing of it left to save."""
        self.roles_done.append(role)
        self._position = None

    def kept_accuracy(self, role: str, select: str) -> float:
        """The validation accuracy of a role's weights that were kept: of the "best" or the "last" of its epochs."""
        accuracies = [entry["accuracy"] for entry in self.history if entry["role"] == role]
        return accuracies[-1] if select == "last" else max(accuracies)

    def load_kept(self, role: str, model: nn.Module) -> None:
        """Put the kept weights of a role, which are on rank 0's disk, into every rank's `model`."""
        merge_head(model)                   # as in the folder
        distributed.broadcast_from_rank0(lambda: self._load_saved(role, model))
        distributed.broadcast_weights(model)

    def _load_saved(self, role: str, model: nn.Module) -> None:
        try:
            models.load_saved(self.out / role, model)
        except (OSError, safetensors.SafetensorError) as error:
            raise BadInput(f"{self.out / role}: its weights cannot be read ({one_line(error)}); put them "
                           "back, or start again with --overwrite") from error

    def write_result(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write result.json, unless the run had ended but for its page; returns what it holds."""
        path = self.out / "result.json"
        if path.exists():
            return json.loads(path.read_text("utf-8"))
        write_atomic(path, json.dumps(result, indent=2).encode())
        return result


# ---- the folder ------------------------------------------------------------------------------------------------

def default_folder(recipe: str, dataset: str, config: str, own_dataset: str) -> Path:
    """The folder of a run without --out. Two data sets never share one.

    own_dataset: the recipe's, whose runs have the folder runs/RECIPE. Other data add their Hub id, or their path from
    the working directory (absolute where they lie outside), and their --config. A slash becomes "--".
    """
    if (dataset, config) == (own_dataset, ""):
        return Path("runs", recipe)
    name, path = dataset, Path(dataset).expanduser()
    if path.exists() or dataset.startswith(("/", "~", ".")):
        name = os.path.abspath(path).removeprefix(os.path.join(os.getcwd(), ""))
    words = [re.sub(r"[^\w.-]", "-", word.replace("/", "--")) for word in (name, config) if word]
    return Path("runs", f"{recipe}-{'@'.join(words)}")


def refuse_inside(out: Path, flag: str, path: str) -> None:
    """Raise BadInput where `path`, the value of `flag`, is a file or folder that --overwrite removes from `out`."""
    place = Path(path).expanduser().resolve()
    for name in RUN_FOLDERS + RUN_FILES:
        part = (out / name).resolve()
        if place.exists() and part in (place, *place.parents):
            raise BadInput(f"{flag} {path}: --overwrite would remove it with the run in {out}; copy it to another "
                           f"place first, or give another --out")


class Opened(NamedTuple):
    """What `open_folder` found."""

    checkpoint: dict[str, Any] | None   # of the run that goes on
    finished: dict[str, Any] | None     # the result of one that has nothing left to do
    replaces: bool                      # whether an old run goes once data and models are found to be good


def open_folder(out: Path, settings: Mapping[str, Any], free: set[str], resume: bool, overwrite: bool,
                restarted: bool = False, defaults: Mapping[str, Any] = {}) -> Opened:
    """Make the folder of a run, if need be, and read the run in it under `resume`. Nothing of a run is removed.

    restarted: torchrun has started the ranks again, so that the run that they began goes on.

    What makes a folder a run is its config.json. The folder stays locked until `unlocked` ends, so that no other
    process trains there. Raises BadInput where the folder holds another run and neither
    `resume` nor `overwrite` is given, where it holds something else, where another process trains in it, and where a
    resumed run has another setting than before (those in `free` aside).
    """
    record = out / "config.json"
    try:
        resume = resume or restarted and not (out / NOT_BEGUN).exists()
        holds_run = out.exists() and any(path for path in out.iterdir()
                                         if path.name != LOCK and not path.match(".config.json.*.tmp"))
        if holds_run and not is_run(out):
            raise BadInput(f"--out {out}: holds files that are not a run; give another folder")
        out.mkdir(parents=True, exist_ok=True)
        lock(out)       # before anything is written: the folder may be another process's
        if holds_run and not (resume or overwrite):
            mark_not_begun(out)
            raise BadInput(f"--out {out}: holds another run; go on with --resume, replace it with --overwrite, or give "
                           f"another folder")

        sweep(out)
        if holds_run and resume:
            _check_settings({**defaults, **json.loads(record.read_text("utf-8"))}, settings, free)
            saved = checkpoint.load(out / "last.ckpt")
            return Opened(saved, read_finished(out, saved), replaces=False)
        if holds_run:
            mark_not_begun(out)     # after `sweep`, which removes the mark of an earlier start
        return Opened(None, None, replaces=holds_run)
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}; give a folder that can be written") from error
    except ValueError as error:
        raise BadInput(f"{record}: not readable ({error}); replace the run with --overwrite") from error


def mark_not_begun(out: Path) -> None:
    """Tell ranks that torchrun restarts that the run in this folder is not theirs."""
    if torch.distributed.is_torchelastic_launched():
        (out / NOT_BEGUN).touch()


def lock(out: Path) -> None:
    """Lock a folder, unless this thread has done so already. Raises BadInput where another process has."""
    place = out.resolve()
    if place in _locked.by_folder:
        return
    held = FileLock(out / LOCK)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise BadInput(f"--out {out}: another process is training there; wait for it, stop it, or give another folder"
                       ) from None
    except (OSError, NotImplementedError):      # a disk without locks, or one that is read only
        return
    _locked.by_folder[place] = held


@contextlib.contextmanager
def unlocked() -> Iterator[None]:
    """Unlock the folders of this thread's runs at the end. Also a decorator."""
    try:
        yield
    finally:
        while _locked.by_folder:
            folder, held = _locked.by_folder.popitem()
            with contextlib.suppress(OSError):      # Windows removes no open file
                (folder / LOCK).unlink()
            held.release()


def is_run(out: Path) -> bool:
    """Whether a folder holds a run. A saved model has a config.json, too, but beside its weights."""
    return (out / "config.json").is_file() and not (out / "model.safetensors").exists()


def read_finished(out: Path, saved: dict[str, Any] | None) -> dict[str, Any] | None:
    """The result of a run that has nothing left to do. One that lacks only its page goes on from its checkpoint."""
    result = out / "result.json"
    if result.exists() and ((out / "report.html").exists() or saved is None):
        return json.loads(result.read_text("utf-8"))
    return None


def remove_run(out: Path) -> None:
    """Remove what a run left in its folder, but for config.json, which the next run replaces at once."""
    try:
        for name in RUN_FILES + RUN_FOLDERS:
            path = out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"--overwrite: {error.filename} cannot be removed ({error.strerror}); give another --out"
                       ) from error


def _check_settings(before: dict[str, Any], settings: Mapping[str, Any], free: set[str]) -> None:
    changed = [f"{cli.option_of(name)} {value} (was {before.get(name)})" for name, value in settings.items()
               if name not in free and before.get(name) != value]
    if changed:
        raise BadInput(f"--resume: another setting makes another run: {', '.join(changed)}")


def sweep(out: Path) -> None:
    """Remove what a killed process was writing: temporary files, and saved folders that were not swapped in."""
    for path in [*out.glob(".*.tmp"), *out.glob("*/.*.tmp")]:
        path.unlink()
    for name in RUN_FOLDERS:
        if (out / f".{name}.old").exists() and not (out / name).exists():  # killed between the two renames
            (out / f".{name}.old").rename(out / name)
        for leftover in (out / f".{name}.new", out / f".{name}.old"):
            shutil.rmtree(leftover, ignore_errors=True)
