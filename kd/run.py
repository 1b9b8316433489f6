"""A run: its folder, position, checkpoint, log, signals and ranks.

Run may know disks, signals and ranks; never a loss, a batch or a forward pass. Otherwise it would become the Trainer
that this project exists to avoid. What there is to learn stands in train.py.
"""

import contextlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Protocol

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from kd import BadInput, cli
from kd.machine import checkpoint, devices, distributed, runtime
from kd.machine.files import write_atomic
from kd.machine.records import Records
from kd.machine.signals import Stop, Stopped

# What a run leaves behind, and --overwrite removes: never a whole folder, in case it holds something else as well.
# The order is that of removal. After a kill in between, the result never stands for files that are gone, and no
# checkpoint looks for them.
RUN_FILES = ("result.json", "last.ckpt.previous", "last.ckpt", "metrics.jsonl", "predictions.npz", "report.html")
RUN_FOLDERS = ("student", "teacher", "control", "tensorboard")
LOCK = ".lock"      # held by the process that trains in this folder


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


@dataclass
class Position:
    """Where a training stands. With the weights and the optimizer, this is all that a resumed run needs."""

    role: str                       # "teacher", "control" or "student"
    loss_sum: Tensor                # scalar on the device, float64 if it can: of this epoch, over this rank's steps
    epoch: int = 0                  # epochs that are complete
    step: int = 0                   # steps of the next one that are done
    kept_score: float = -1.0        # on validation, of the weights that are kept: of the best epoch, or of the last
    kept_epoch: int = 0             # and their epoch, counted from 1
    clock: Clock = field(default_factory=Clock)     # seconds of training in this epoch

    def count(self, loss: Tensor, samples: int) -> None:
        """A step is done, on that many samples of all ranks."""
        self.step += 1
        self.loss_sum += loss * samples

    def next_epoch(self) -> None:
        """The epoch is complete: the next one begins at its first step."""
        self.epoch, self.step, self.clock = self.epoch + 1, 0, Clock()
        self.loss_sum.zero_()


class Run:
    """One run, in `out`. Every rank has one; only rank 0 writes."""

    def __init__(self, out: Path, settings: Mapping[str, Any], free: set[str], save_minutes: float, opened: "Opened",
                 stop: Stop) -> None:
        self.out, self.settings, self.free, self.save_minutes, self.stop = out, settings, free, save_minutes, stop
        self.commit = runtime.commit()      # of the code that runs, read before anybody changes it
        self.finished = opened.finished     # the result of a run that has nothing left to do, else None
        self._replaces = opened.replaces

        saved = opened.checkpoint or {}
        self.history: list[dict[str, Any]] = saved.pop("history", [])   # an entry an epoch
        self.roles_done: list[str] = saved.pop("roles_done", [])
        self.facts: dict[str, str] = saved.pop("facts", {})
        self.arithmetic: str = saved.pop("arithmetic", "")
        self._began = time.monotonic() - saved.pop("seconds", 0.0)
        self._training = saved              # of the role that was under way, until `restore` takes it up
        self._last_save = time.monotonic()
        self._records = Records(out)

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path, settings: Mapping[str, Any], free: set[str], save_minutes: float = 10.0,
             resume: bool = False, overwrite: bool = False) -> Iterator["Run"]:
        """The run in a folder, which no other process may use meanwhile. Signals stop it between two steps. Collective.

        settings: recorded and compared, never interpreted; `free` names those that a resumed run may change.
        overwrite: replace the run in the folder. `begin` does so, and until then the folder stays as it is.
        Raises BadInput where the folder holds another run, something else, or a run with other settings.
        """
        with contextlib.ExitStack() as at_the_end:
            stop = Stop()
            stop.install()
            at_the_end.callback(stop.restore)
            # A notebook goes on in this process.
            at_the_end.callback(runtime.tune_allocator, keep=False)
            # torchrun has started the ranks again, so that the run that they began goes on.
            resume = resume or bool(distributed.max_over_ranks(distributed.restarted())[0])
            opened = distributed.broadcast_from_rank0(
                lambda: open_folder(out, settings, free, resume, overwrite, at_the_end))
            yield cls(out, settings, free, save_minutes, opened, stop)

    @property
    def seconds(self) -> float:
        """Wall time of the run, including the processes before a resume."""
        return time.monotonic() - self._began

    # ---- is it the same run? ------------------------------------------------------------------------------

    def begin(self, facts: Mapping[str, str], record: Mapping[str, Any], arithmetic: str) -> None:
        """From here on the folder is a run. Called once data and models are found to be good. Collective.

        facts       what the settings stand for, such as dataset="<its digest>". They must be the same in every rank,
                    and in a resumed run the same as before
        record      what config.json holds beside the settings
        arithmetic  the device, the precision and the kernels, in words: a resumed run says where it goes on with others

        Raises BadInput where facts or settings differ, and where a run that is to be replaced cannot be removed.
        """
        distributed.check_same_on_all_ranks({**self.settings, **facts}, self.free)
        for name, value in self.facts.items():
            if facts[name] != value:
                raise BadInput(f"--resume: what {cli.option_of(name)} stands for has changed since the run "
                               f"began; give it as it was, or start again with --overwrite")
        self.facts = dict(facts)
        if self.arithmetic not in ("", arithmetic):
            print(f"--resume: computed with {self.arithmetic} until here, and with {arithmetic} from here on: the "
                  f"result is not the same to the bit")
        self.arithmetic = arithmetic

        def write() -> None:
            if self._replaces:
                remove_run(self.out)
            write_atomic(self.out / "config.json", json.dumps({**self.settings, **record}, indent=2).encode())

        distributed.broadcast_from_rank0(write)

    # ---- position and checkpoint ---------------------------------------------------------------------------

    def restore(self, role: str, saved: Mapping[str, Saved], device: torch.device) -> Position:
        """The position of this role's training: its start, or where the checkpoint was.

        saved: what a checkpoint holds besides the position, by name; filled from it in a resumed run.
        """
        position = Position(role, torch.zeros((), dtype=devices.widest_float(device), device=device))
        before, self._training = self._training, {}
        if "position" in before:
            for name, thing in saved.items():
                thing.load_state_dict(before[name])
            values = before["position"]
            position.loss_sum.fill_(values.pop("loss_sum"))
            position.clock = Clock(values.pop("train_seconds"))
            for name, value in values.items():
                setattr(position, name, value)
        self._last_save = time.monotonic()
        return position

    def save_is_due(self) -> bool:
        """Whether a signal came to any rank, or --save-minutes have passed. Collective."""
        late = time.monotonic() - self._last_save > 60 * self.save_minutes
        return any(distributed.max_over_ranks(self.stop.signal, late))

    def save(self, position: Position, saved: Mapping[str, Saved]) -> None:
        """Write the checkpoint. Collective. Raises TrainingFault where the disk is full, and Stopped after a signal."""
        running = position.clock.pause()
        checkpoint.save(self.out / "last.ckpt", {
            "history": self.history, "roles_done": self.roles_done, "facts": self.facts,
            "arithmetic": self.arithmetic, "seconds": self.seconds,
            "position": {"role": position.role, "epoch": position.epoch, "step": position.step,
                         "loss_sum": distributed.mean_over_ranks(position.loss_sum).item(),
                         "train_seconds": position.clock.seconds, "kept_score": position.kept_score,
                         "kept_epoch": position.kept_epoch},
            **{name: thing.state_dict() for name, thing in saved.items()}})
        self._last_save = time.monotonic()
        # The ranks meet here, so that the logits of all of them are on the disk before any goes on.
        self.stop_if_requested()
        if running:
            position.clock.start()

    def stop_if_requested(self, save: Callable[[], None] = lambda: None) -> None:
        """After a signal to any rank: `save` a training that is under way, then raise Stopped. Collective."""
        if number := distributed.max_over_ranks(self.stop.signal)[0]:
            save()
            raise Stopped(number)

    # ---- log, roles and result -----------------------------------------------------------------------------

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

    def write_result(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write result.json, unless the run had ended but for its page; returns what it holds."""
        path = self.out / "result.json"
        if path.exists():
            return json.loads(path.read_text("utf-8"))
        write_atomic(path, json.dumps(result).encode())
        return result


# ---- the folder ------------------------------------------------------------------------------------------------

class Opened(NamedTuple):
    """What `open_folder` found."""

    checkpoint: dict[str, Any] | None   # of the run that goes on
    finished: dict[str, Any] | None     # the result of one that has nothing left to do
    replaces: bool                      # whether an old run goes once data and models are found to be good


def open_folder(out: Path, settings: Mapping[str, Any], free: set[str], resume: bool, overwrite: bool,
                at_the_end: contextlib.ExitStack) -> Opened:
    """Make the folder of a run, if need be, and read the run in it under `resume`. Nothing of a run is removed.

    What makes a folder a run is its config.json. The folder is locked until `at_the_end`. Raises BadInput where the
    folder holds another run and neither `resume` nor `overwrite` is given, where it holds something else, where another
    process trains in it, and where a resumed run has another setting than before (those in `free` aside).
    """
    record = out / "config.json"
    try:
        holds_run = out.exists() and any(path for path in out.iterdir()
                                         if path.name != LOCK and not path.match(".config.json.*.tmp"))
        # A saved model has a config.json, too, but beside its weights.
        if holds_run and not (record.is_file() and not (out / "model.safetensors").exists()):
            raise BadInput(f"--out {out}: holds files that are not a run; give another folder")
        out.mkdir(parents=True, exist_ok=True)
        at_the_end.enter_context(locked(out))      # before anything is written: the folder may be another process's
        if holds_run and not (resume or overwrite):
            raise BadInput(f"--out {out}: holds another run; go on with --resume, replace it with --overwrite, or give "
                           f"another folder")
        sweep(out)
        if not (holds_run and resume):
            return Opened(None, None, replaces=holds_run)
        _check_settings(json.loads(record.read_text("utf-8")), settings, free)
        saved, result = checkpoint.load(out / "last.ckpt"), out / "result.json"
        # A run that lacks only its page goes on from its checkpoint.
        finished = result.exists() and ((out / "report.html").exists() or saved is None)
        return Opened(saved, json.loads(result.read_text("utf-8")) if finished else None, replaces=False)
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}; give a folder that can be written") from error
    except ValueError as error:
        raise BadInput(f"{record}: not readable ({error}); replace the run with --overwrite") from error


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock a folder. Raises BadInput where another process has."""
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(f"--out {out}: another process is training there; wait for it, stop it, or give another folder"
                       ) from None
    except (OSError, NotImplementedError):      # a disk without locks, or one that is read only
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            (out / LOCK).unlink(missing_ok=True)
        lock.release()


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
    for path in out.glob(".*.tmp"):
        path.unlink()
    for name in RUN_FOLDERS:
        if (out / f".{name}.old").exists() and not (out / name).exists():  # killed between the two renames
            (out / f".{name}.old").rename(out / name)
        for leftover in (out / f".{name}.new", out / f".{name}.old"):
            shutil.rmtree(leftover, ignore_errors=True)
