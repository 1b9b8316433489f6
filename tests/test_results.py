"""results/: the tables and figures, the list of experiments, what is kept of a run, and the runs that are made."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train
from kd import cli, few_labels
from kd.data.table import Table, open_dataset
from kd.tools import report
from results import experiments, keep, tables
from results.experiments import EXPERIMENTS, METHODS, RUNS, TAUGHT
from tests.helpers import toy

# ---- tables and figures ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_is_made_from_its_runs(name):
    """To correct it, run `python -m results.tables`."""
    table = tables.TABLES[name]()
    documents = [path.read_text() for path in tables.DOCUMENTS]
    assert documents == [tables.with_table(text, name, table) for text in documents]
    assert documents != [tables.with_table(text, name, "another") for text in documents]


def dots(figure: Path) -> list[tuple[str, int, int]]:
    """The colour and the place of each dot of an SVG file, in whole points."""
    found = re.findall(r'<use [^>]*x="([^"]*)" y="([^"]*)" style="fill: ([^;"]*)', figure.read_text())
    return [(colour, round(float(x)), round(float(y))) for x, y, colour in found]


@pytest.mark.parametrize("name, least", [("few", 60), ("methods", 10)])
def test_every_figure_is_drawn_from_its_runs(tmp_path, name, least):
    """Another matplotlib may write other bytes, but the same dots."""
    tables.FIGURES[name](tmp_path / "drawn.svg")
    assert dots(tables.HERE / f"{name}.svg") == dots(tmp_path / "drawn.svg")
    assert len(dots(tmp_path / "drawn.svg")) >= least


def test_runs_are_compared_within_each_seed_and_picture():
    """Ours are right where theirs are, and on a quarter of the pictures more."""
    ours = dict(enumerate((np.random.default_rng(0).random((4, 200)) < 0.8).astype(int)))
    theirs = {seed: ours[seed] * (np.arange(200) % 4 > 0) for seed in range(3)}
    found = tables.difference(ours, theirs)
    assert found is not None and found["n"] == 3
    low, high = found["interval"]
    assert 0.1 < low < found["mean"] < high < 0.3
    theirs.pop(0)
    assert tables.difference(ours, theirs) is None


def test_every_class_counts_alike_on_request(monkeypatch):
    """Right on the larger class only, which has three of four pictures."""
    run = {"arm": "some", "labels": {"test": [[5, 150], [2, 50]]},
           "right": {"student": {"test": np.packbits([1] * 150 + [0] * 50).tobytes().hex()}}}
    monkeypatch.setattr(tables, "read_runs", lambda name: {0: run})
    assert tables.hits_of("")[0].mean() == 0.75 and tables.hits_of("", by_class=True)[0].mean() == 0.5


# ---- the list ----------------------------------------------------------------------------------------

KEPT = {name: keep.read_runs(name) for name in EXPERIMENTS if "/" in name and keep.read_runs(name)}


@pytest.mark.parametrize("name", KEPT)
def test_the_list_has_the_settings_the_seeds_and_the_teachers_of_the_kept_runs(name):
    experiment = EXPERIMENTS[name]
    words = [*experiment.flags.split(), "--dataset", experiment.data]
    settings = dataclasses.asdict(cli.parse_config(train.Config, train.RECIPES, words, ""))
    for key in ("teacher_weights", "student_weights"):
        settings[key] = Path(settings[key]).name
    assert KEPT[name].keys() == set(experiment.seeds)
    for seed, run in KEPT[name].items():
        assert run["config"] == {setting: settings[setting] for setting in run["config"]}
        if "tune" not in name:
            assert re.fullmatch(r"[0-9a-f]{40}", run["commit"])
            same_pictures = KEPT["methods/control" if "caltech" in experiment.data else "few/beans-60-all"][0]
            assert run["labels"] == same_pictures["labels"] or "folds" in name
            if TAUGHT in experiment.flags:
                first, _ = experiment.first.split("/seed-")
                assert run["teacher_sha256"] == KEPT[first][seed]["teacher_sha256"]


def test_the_run_that_must_have_ended_first_is_in_the_list():
    for experiment, seed in RUNS.values():
        assert "FIRST" not in experiment.flags or experiment.first.format(seed=seed) in RUNS


@pytest.mark.parametrize("name", METHODS)
def test_the_best_value_on_validation_was_chosen(name):
    _, values, best = METHODS[name]
    shares = {value: KEPT[f"methods/tune-{name}-{value}"][100]["student"]["validation_accuracy"]
              for value in values.split()}
    assert best == max(shares, key=lambda value: shares[value])


# ---- data sets of their own --------------------------------------------------------------------------

@pytest.fixture
def table(tmp_path) -> Table:
    root = toy.class_folders(tmp_path / "data/beans", {"train": {"a": 10, "b": 10, "c": 20},
                                                       "validation": {"a": 3, "b": 4, "c": 1},
                                                       "test": {"a": 5, "b": 2, "c": 5}})
    return open_dataset(str(root), say=lambda line: None)


def test_the_labelled_pictures_are_repeated_to_an_epoch(table):
    pictures = experiments.labelled(table, 0, 6)
    train = table.splits["train"]
    kept = train[few_labels.keep_labels(table.labels[train], 6, 0)]
    counts = Counter(pictures["train"][:, 0].tolist())
    assert counts.keys() == set(kept.tolist()) and sum(counts.values()) == 40 and set(counts.values()) == {6, 7}
    assert all(table.labels[row] == label for row, label in pictures["train"])
    assert pictures["test"][:, 0].tolist() == table.splits["test"].tolist()


def test_the_asked_for_share_of_labels_is_wrong_and_nothing_else(table):
    wrong = {}
    for percent in (20, 40):
        pictures = experiments.with_wrong_labels(table, 0, percent)
        assert pictures["train"][:, 0].tolist() == table.splits["train"].tolist()
        wrong[percent] = {(row, label) for row, label in pictures["train"].tolist() if label != table.labels[row]}
        assert len(wrong[percent]) == 40 * percent // 100
        assert np.array_equal(pictures["test"][:, 1], table.labels[table.splits["test"]])
    assert wrong[20] < wrong[40]


def test_each_picture_is_tested_in_one_fold_and_seen_in_no_other_split_of_it(table):
    tested: Counter[int] = Counter()
    for seed in range(experiments.FOLDS):
        pictures = experiments.fold(table, seed)
        assert sorted(np.concatenate(list(pictures.values()))[:, 0]) == list(range(60))
        assert np.abs(np.bincount(pictures["test"][:, 1]) - (3.6, 3.2, 5.2)).max() < 1      # a fifth of each class
        tested.update(pictures["test"][:, 0].tolist())
    assert set(tested.values()) == {1}


# ---- making runs -------------------------------------------------------------------------------------

@pytest.fixture
def commands(tmp_path, table, monkeypatch) -> list[str]:
    """The commands that would have been run. The first one ends well, the second one does not."""
    found: list[str] = []

    def run(command: list[str]) -> SimpleNamespace:
        found.append(" ".join(command))
        return SimpleNamespace(returncode=2 * len(found) - 2)

    monkeypatch.setattr(experiments, "DATA", tmp_path / "data")
    monkeypatch.setattr(experiments, "OUT", tmp_path / "runs")
    monkeypatch.setattr(experiments.subprocess, "run", run)
    return found


def test_nothing_learns_from_a_run_that_has_not_ended(tmp_path, commands):
    first = tmp_path / "runs/few/beans-60-all/seed-1"
    first.mkdir(parents=True)
    with pytest.raises(SystemExit, match="few/beans-60-all/seed-1: make this run first"):
        experiments.make("few/beans-60-hard/seed-1")
    (first / "predictions.npz").touch()
    experiments.make("few/beans-60-hard/seed-1")
    assert f"--teacher-weights {first}/teacher --teacher-epochs 0 --method hard --seed 1" in commands[0]
    with pytest.raises(SystemExit, match="2"):
        experiments.make("few/beans-60-all/seed-1")


def test_the_wrong_labels_are_a_folder_that_the_run_reads(tmp_path, table, commands):
    experiments.make("few/beans-wrong-20/seed-2")
    root = tmp_path / "runs/pictures/seed-2/beans-wrong-20"
    assert f"--dataset {root} " in commands[0]
    written = open_dataset(str(root), say=lambda line: None)
    expected = experiments.with_wrong_labels(table, 2, 20)
    for split, pictures in expected.items():
        rows = sorted(written.splits[split], key=lambda row: int(Path(written.name_of(row)).stem))
        assert [written.read(row) for row in rows] == [table.read(row) for row in pictures[:, 0]]
        assert written.labels[rows].tolist() == pictures[:, 1].tolist()


# ---- keeping a run -----------------------------------------------------------------------------------

def test_a_kept_run_has_its_counts_in_the_order_of_the_data_set_and_no_path(trained):
    run = Path(trained[0].out)
    record, result = keep.record_of(run), report.read_result(run)
    assert (record["arm"], record["seed"]) == (run.parent.name, 0) and str(run.parent) not in json.dumps(record)
    for role in ("teacher", "student"):
        for split in ("validation", "test"):
            labels, right = keep.labels_and_right(record, role, split)
            assert right.mean() == result[role][f"{split}_accuracy"]
            assert labels.tolist() == sorted(labels) and len(labels) == 12


def test_pictures_with_names_of_their_own_stay_in_their_order():
    assert keep.in_order(["leaf.3", "leaf.1", "x"]).tolist() == [0, 1, 2]
    assert keep.in_order(["a/1.jpg", "b/0.jpg", "b/1.jpg"]).tolist() == [0, 1, 2]
