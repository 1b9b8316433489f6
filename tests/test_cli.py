"""Flags: defaults, recipes and flags override each other in that order; a mistake is one line that helps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd import BadInput, TrainingFault, cli
from kd.config import RECIPES, Config
from kd.tools import arguments

ROOT = Path(__file__).resolve().parents[1]


def parse(*argv: str) -> Config:
    return cli.parse_config(Config, RECIPES, list(argv), "")


def test_flags_override_the_recipe_which_overrides_the_defaults():
    assert parse("--recipe", "tutorial").lr == Config().lr == 5e-5
    assert parse().recipe == "demo" and parse().dataset == "leaves"
    assert parse("--lr", "0.5", "--control").lr == 0.5
    assert parse("--recipe", "tutorial").control is False
    assert parse("--recipe", "tutorial", "--control").control is True


def test_the_recipes_only_set_what_is_a_flag():
    for name in RECIPES:
        assert parse("--recipe", name).recipe == name


@pytest.mark.parametrize("argv, expected", [
    (["--recipe", "demmo"], "--recipe demmo: not one of its values; did you mean demo?"),
    (["--teacher-weight", "none"], "unknown argument --teacher-weight; did you mean --teacher-weights"),
    (["--amp", "bf61"], "--amp bf61: not one of its values; did you mean bf16"),
    (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    (["--epochs", "0"], "--epochs 0: must be at least 1"),
    (["--kd-weight", "1.5"], "--kd-weight 1.5: must be at least 0 and at most 1"),
    (["--temperature", "0"], "--temperature 0.0: must be at most 1000 and above 0"),
    (["--lr", "nan"], "--lr nan: must be above 0"),
    (["--lr", "inf"], "--lr inf: must be above 0"),
    (["--unlabelled", ""], "--unlabelled: its value is empty; give one, or leave the flag out"),
])
def test_a_mistake_is_named(argv, expected):
    with pytest.raises(BadInput) as caught:
        parse(*argv)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("argv, name", [
    (["student", "--dataset", "", "--json"], "--dataset"), (["student", "--cache-dir="], "--cache-dir"),
    (["", "--dataset", "leaves"], "an argument"), (["student", ""], "an argument"),
    (["student", "--json", ""], "an argument"), (["student", "--split=test", ""], "an argument")])
def test_an_empty_value_is_refused_by_every_command(argv, name):
    parser = arguments.make_parser("evaluate", None)
    arguments.add_data_flags(parser)
    arguments.add_json_flag(parser, "")
    with pytest.raises(BadInput, match=f"^{name}: its value is empty"):
        parser.parse_args(argv)


def test_an_empty_place_of_caches_is_none():
    said = [subprocess.run([sys.executable, "-c", "from kd import cli; print(cli.CACHE_DIR)"], cwd=ROOT, text=True,
                           capture_output=True, env={**os.environ, "XDG_CACHE_HOME": place}).stdout.strip()
            for place in ("", "/elsewhere")]
    assert said == [os.path.join("~/.cache", "kd"), os.path.join("/elsewhere", "kd")]


def test_help_answers_before_torch_is_imported():
    done = subprocess.run([sys.executable, "-X", "importtime", "train.py", "--help"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "--kd-weight" in done.stdout
    lines = done.stderr.splitlines()  # "import time: self | cumulative | module"
    imported = {line.rsplit("|", 1)[1].strip() for line in lines}
    assert all(line.startswith("import time:") for line in lines) and "argparse" in imported
    assert not {"torch", "numpy", "timm", "kd.losses"} & imported


def test_a_mistake_leaves_with_status_2_and_one_line():
    done = subprocess.run([sys.executable, "train.py", "--recipe", "nope"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "train.py: error: --recipe nope: not one of its values; known: demo, tutorial, best, few\n"


@pytest.mark.parametrize("error, status, said", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"), 1,
     "train.py: error: out of memory with --batch-size 99 and --size 64; make one of them smaller, then --overwrite\n"),
    (MemoryError(), 1, "train.py: error: out of memory with --batch-size 99 and --size 64"),
    (TrainingFault("a full\ndisk"), 1, "train.py: error: a full disk\n"), (BadInput("no"), 2, "train.py: error: no\n"),
    (BadInput("two\n  a  b\n  c\nd"), 2, "train.py: error: two\n  a b\n  c d\n")])
def test_what_a_user_can_mend_is_one_line_and_a_status(error, status, said, capsys):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as left:
        cli.run(main, parse("--batch-size", "99", "--size", "64"))
    assert left.value.code == status and capsys.readouterr().err.startswith(said)


def test_a_path_that_sounds_like_a_network_is_only_a_path(capsys):
    def main(config):
        raise BadInput("--dataset /data/igloo: no such folder")

    with pytest.raises(SystemExit) as left:
        cli.run(main, Config())
    assert left.value.code == 2 and "error: --dataset /data/igloo: no such folder\n" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    def main(config):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        cli.run(main, parse())


def test_the_command_gives_the_config_again():
    for words in (["--recipe", "tutorial"], ["--seed", "4", "--control", "--lr", "0.01"],
                  ["--recipe", "best", "--teacher", "tf_efficientnet_lite0", "--augment", "crop", "--views", "0"]):
        config = cli.parse_config(Config, RECIPES, words, "")
        command = cli.command(config, RECIPES)
        assert command.startswith("python train.py")
        assert cli.parse_config(Config, RECIPES, command.split()[2:], "") == config
    assert cli.command(Config(dataset="a/b c/d"), {}).endswith("--dataset d")
    assert [cli.base_name(name) for name in ("someone/toy", "/x/beans", "~/beans", "./b", "imagenet", "a/b/c")] == [
        "someone/toy", "beans", "beans", "b", "imagenet", "c"]


@pytest.mark.parametrize("dataset, config, folder", [
    ("beans", "", "tutorial"), ("leaves", "", "tutorial-leaves"), ("beans", "small", "tutorial-beans@small"),
    ("someone/beans", "", "tutorial-someone--beans"), ("someone/beans", "a b/c", "tutorial-someone--beans@a-b--c"),
    ("photos", "", "tutorial-photos"), ("./photos/", "", "tutorial-photos"), ("HERE/photos", "", "tutorial-photos"),
    ("photos/côte d'azur", "", "tutorial-photos--côte-d-azur"), ("/data/photos", "", "tutorial---data--photos"),
    ("~/photos", "", "tutorial---home--me--photos")])
def test_every_data_set_has_a_default_folder_of_its_own(tmp_path, monkeypatch, dataset, config, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "photos").mkdir()
    cfg = Config(recipe="tutorial", dataset=dataset.replace("HERE", str(tmp_path)), config=config)
    assert cfg.folder() == Path("runs", folder)


def test_the_default_folder_is_the_recipes_for_its_own_data_only():
    assert parse().folder() == Path("runs/demo") and parse("--dataset", "beans").folder() == Path("runs/demo-beans")
    assert parse("--out", "here").folder() == Path("here")
