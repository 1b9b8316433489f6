"""A run within a process that goes on afterwards: a notebook, a web app, a pool of threads."""

import dataclasses
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import train
from kd import BadInput, cli
from kd.machine import runtime


def test_a_config_of_python_is_that_of_the_command_line():
    config = train.Config.of("best", epochs=np.int64(3), lr=1, out=Path("here"), control=True)
    flags = "--recipe best --epochs 3 --lr 1 --out here --control".split()
    assert config == cli.parse_config(train.Config, train.RECIPES, flags, "")
    assert [type(value) for value in (config.epochs, config.lr, config.out)] == [int, float, str]


@pytest.mark.parametrize("flags, expected", [
    ({"epoch": 3}, "unknown argument epoch; did you mean epochs"),
    ({"epochs": "3"}, "--epochs '3': must be of type int"),
    ({"control": 1}, "--control 1: must be of type bool"),
    ({"kd_weight": 2}, "--kd-weight 2.0: must be at least 0 and at most 1")])
def test_a_mistake_is_named_as_on_the_command_line(flags, expected):
    with pytest.raises(BadInput) as caught:
        train.Config.of(**flags)
    assert str(caught.value).startswith(expected)


def test_a_run_in_a_thread_gives_what_the_command_gives(trained, tmp_path):
    config, expected = trained
    flags = dataclasses.asdict(config) | {"out": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    before = dict(os.environ)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(train.main, train.Config.of(**flags)).result()
    assert (result["teacher"], result["student"]) == (expected["teacher"], expected["student"])
    assert dict(os.environ) == before


def test_after_a_run_that_failed_signals_and_allocator_are_as_before(tiny, monkeypatch):
    calls: list[dict] = []
    monkeypatch.setattr(runtime, "tune_allocator", lambda **settings: calls.append(settings))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(BadInput):
        train.main(dataclasses.replace(tiny, dataset="nowhere/at/all"))
    assert calls == [{}, {"keep": False}]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
