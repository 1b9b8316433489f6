"""A run within a process that goes on afterwards: a notebook, a web app, a pool of threads."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import constants

import train
from kd import BadInput, cli
from kd.machine import hub


def test_a_config_of_python_is_that_of_the_command_line():
    def parse(*argv):
        return cli.parse_config(train.Config, train.RECIPES, list(argv), "")

    assert train.Config.of("demo") == train.Config.of() == parse()
    assert train.Config.of("best", control=True) == parse("--recipe", "best", "--control")
    config = train.Config.of("demo", epochs=np.int64(3), lr=1, out=Path("here"))
    assert config == parse("--epochs", "3", "--lr", "1", "--out", "here")
    assert [type(value) for value in (config.epochs, config.lr, config.out)] == [int, float, str]


@pytest.mark.parametrize("flags, expected", [
    ({"recipe": "demmo"}, "--recipe demmo: not one of its values; did you mean demo?"),
    ({"epoch": 3}, "unknown argument epoch; did you mean epochs"),
    ({"epochs": 0}, "--epochs 0: must be at least 1"),
    ({"epochs": "3"}, "--epochs '3': must be of type int"),
    ({"epochs": 3.5}, "--epochs 3.5: must be of type int"),
    ({"control": 1}, "--control 1: must be of type bool"),
    ({"views": True}, "--views True: must be of type int"),
    ({"out": None}, "--out None: must be of type str"),
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


def test_a_hub_that_could_not_be_reached_is_tried_again_by_the_next_run(tiny, unreachable_hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    during = []
    answers = hub._answers

    def watched(timeout):
        during.append(constants.HF_HUB_OFFLINE)
        return answers(timeout)

    monkeypatch.setattr(hub, "_answers", watched)
    before, bars = dict(os.environ), datasets.are_progress_bars_disabled()
    verbosity = datasets.utils.logging.get_verbosity()
    for _ in range(2):
        with pytest.raises(BadInput, match="--dataset someone/data: the Hub cannot be reached"):
            train.main(dataclasses.replace(tiny, dataset="someone/data"))
        assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    assert during == [False, False] and dict(os.environ) == before
    assert (datasets.are_progress_bars_disabled(), datasets.utils.logging.get_verbosity()) == (bars, verbosity)


def test_within_a_run_the_hub_is_tried_once(unreachable_hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with hub.online_again():
        assert not hub.reachable()
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
        monkeypatch.setattr(hub, "_answers", lambda timeout: pytest.fail("asked again"))
        assert not hub.reachable()
    assert not constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "0"
