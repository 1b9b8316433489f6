"""Where the loop waits for the GPU: the real `fit` under torch.cuda.set_sync_debug_mode."""

import collections
import contextlib
import dataclasses
import io
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, Iterator

import torch

import train
from tests.conftest import make_photos, tiny_config
from tests.gpu import DEVICE

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 3     # steps of each model, whose first kernels are loaded and tuned, which may wait


def place() -> str:
    """The innermost line of this project that is being run, as file:line function."""
    frames = [frame for frame in traceback.extract_stack()
              if frame.filename.startswith((str(ROOT / "kd"), str(ROOT / "train.py")))]
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno} {frames[-1].name}" if frames else "?"


@contextlib.contextmanager
def sync_debug(mode: str) -> Iterator[None]:
    """Under "error" torch raises where the host waits for the GPU, under "warn" it warns. Nothing on a CPU."""
    if DEVICE.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tiny_run(augment: str, amp: str, mode: str) -> dict[str, Any]:
    """A tiny run: one epoch of a teacher and two of a student, 5 steps each.

    mode "error": `train_step` is watched; at the first wait the run ends. "warn": the whole run is watched, and each
    place is noted with its count.
    """
    places: collections.Counter = collections.Counter()
    steps: collections.Counter = collections.Counter()      # of each model
    failed, real = "", train.train_step

    def watched(*arguments: Any) -> Any:
        steps[arguments[0]] += 1
        watch = mode == "error" and steps[arguments[0]] > WARM_UP
        with sync_debug(mode) if watch else contextlib.nullcontext():
            return real(*arguments)

    def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        if "synchroniz" in str(message):
            places[place()] += 1

    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(tiny_config(make_photos(Path(folder) / "photos"), Path(folder)), augment=augment,
                                     amp=amp, views=0, device=DEVICE.type, compile="off")
        train.train_step = watched  # type: ignore[assignment]
        try:
            with warnings.catch_warnings(), sync_debug(mode) if mode == "warn" else contextlib.nullcontext():
                warnings.simplefilter("always")
                warnings.showwarning = show
                train.main(config)
        except RuntimeError:
            failed = traceback.format_exc()
        finally:
            train.train_step = real
    if mode == "error":
        return {"waits_in_train_step": bool(failed), "where": failed.splitlines()[-12:],
                "steps": steps.total()}
    return {"waits": dict(places.most_common()), "steps": steps.total(), "error": failed.splitlines()[-12:]}


def measure() -> dict[str, Any]:
    """Both modes, for what differs in copies to the device. Each is printed once it is known, lest it be lost."""
    settings = [("none", "off"), ("crop", "auto"), ("flip", "auto")]
    if DEVICE.type == "cuda":
        settings += [("crop", "fp16")]
    found = {}
    for augment, amp in settings:
        name, begin = f"{augment}, amp {amp}", time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            found[name] = {mode: tiny_run(augment, amp, mode) for mode in ("error", "warn")}
        print(summary(name, found[name]), f"({time.monotonic() - begin:.1f} s)")
    return found


def summary(name: str, modes: dict[str, Any]) -> str:
    """What both modes found, in a line, with the three places that wait most often."""
    waits = modes["warn"]["waits"]
    places = "".join(f", {count} at {where}" for where, count in list(waits.items())[:3])
    return (f"{name}: {'waits' if modes['error']['waits_in_train_step'] else 'no wait'} in train_step; "
            f"{sum(waits.values())} waits in a whole run of {modes['warn']['steps']} steps{places}")
