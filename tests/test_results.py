"""results/: what is kept of a run, the differences between arms, and the runs that the scripts make."""

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm

import train
from kd import cli
from kd.data.frames import decode
from kd.data.sources import open_dataset
from kd.features import width
from kd.few_labels import by_role
from kd.tools import report
from results import arms, few_labels, folds, launch, methods, steps
from results.arms import Arm
from tests.helpers import toy
from tests.helpers.runs import stop_at_step


# ---- differences between arms ----------------------------------------------------------------------------

LABELS = np.repeat([0, 1], [150, 50])


def kept(folder: Path, seed: int, right: list[int], teacher: str = "one", **settings) -> None:
    """A kept run whose student had these of 200 test pictures right. Three in four are of the first class."""
    digits = np.packbits(np.array(right, bool)).tobytes().hex()
    result = {"config": {"seed": seed, **settings}, "teacher_sha256": teacher,
              "labels": {"test": LABELS.astype(np.uint8).tobytes().hex()}, "right": {"student": {"test": digits}}}
    path = folder / f"seed-{seed}" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(arms, "HERE", tmp_path)
    return tmp_path


def test_arms_are_compared_within_each_seed_and_picture(here):
    generator = np.random.default_rng(0)
    for seed in range(3):
        first = (generator.random(200) < 0.8).tolist()
        kept(here / "first", seed, first)
        kept(here / "second", seed, [int(one and i % 4 > 0) for i, one in enumerate(first)])
    assert len(arms.accuracies(Arm("first"))) == 3
    found = arms.difference(Arm("first"), Arm("second"))
    shares = [a - b for a, b in zip(arms.accuracies(Arm("first")), arms.accuracies(Arm("second")))]
    assert found is not None and found["n"] == 3 and found["mean"] == pytest.approx(np.mean(shares))
    low, high = found["interval"]
    assert 0.1 < low < found["mean"] < high < 0.3
    assert arms.difference(Arm("first"), Arm("absent")) is None


def test_every_class_counts_alike_on_request(here):
    """One is right on the large class only, the other on the small one only."""
    for seed in range(3):
        kept(here / "large", seed, (LABELS == 0).astype(int).tolist())
        kept(here / "small", seed, (LABELS == 1).astype(int).tolist())
    assert arms.accuracies(Arm("large"))[0] == 0.75 and arms.accuracies(Arm("large"), by_class=True)[0] == 0.5
    plain, balanced = (arms.difference(Arm("large"), Arm("small"), by_class=by_class) for by_class in (False, True))
    assert plain is not None and plain["mean"] == 0.5
    assert balanced is not None and abs(balanced["mean"]) < 1e-12


def test_two_seeds_have_no_interval(here):
    for seed in range(2):
        kept(here / "first", seed, [1] * 200)
        kept(here / "second", seed, [0] * 200)
    assert arms.difference(Arm("first"), Arm("second")) is None


def test_arms_that_differ_in_more_than_is_said_are_not_compared(here):
    for seed in range(3):
        kept(here / "kd", seed, [1] * 200, method="kd", lr=0.1)
        kept(here / "hard", seed, [0] * 200, method="hard", lr=0.1)
        kept(here / "faster", seed, [0] * 200, method="kd", lr=0.2)
        kept(here / "taught", seed, [0] * 200, method="kd", lr=0.1, teacher="another")
    assert arms.difference(Arm("kd"), Arm("hard"), allowed=frozenset({"method"})) is not None
    for other in ("hard", "faster", "taught"):
        with pytest.raises(AssertionError):
            arms.difference(Arm("kd"), Arm(other))
    kept(here / "kd", 3, [1] * 200, method="kd", lr=0.2)
    with pytest.raises(AssertionError, match="kd"):
        arms.read_runs("kd")


# ---- keeping a run ---------------------------------------------------------------------------------------

def test_pictures_of_a_written_folder_count_in_the_order_of_the_data_set():
    values = np.array([10, 11, 12, 13, 14])
    names = ["test/a/00004.jpg", "test/a/00001.jpg", "test/b/00000.jpg", "test/b/00002.jpg", "test/b/00003.jpg"]
    assert arms.in_order(values, names).tolist() == [12, 11, 13, 14, 10]
    assert arms.in_order(values, ["leaf.3", "leaf.1", "leaf.2", "x", "y"]) is values


def test_a_kept_run_has_its_counts_and_no_path(tiny, here):
    run = here / "runs" / "some-arm" / "seed-0"
    result = train.main(dataclasses.replace(tiny, out=str(run), control=True))
    arms.keep(run, here / "few")
    found = arms.read_runs("few/some-arm")[0]
    assert str(here) not in json.dumps(found) and "confusion" not in json.dumps(found)
    assert arms.labels_of(found, ["test"]).tolist() == sorted(arms.labels_of(found, ["test"]).tolist())
    for role in ("teacher", "control", "student"):
        assert arms.right(found, role, ["test"]).sum() == result[role]["test_correct"]
        assert arms.right(found, role, ["validation"]).mean() == pytest.approx(result[role]["validation_accuracy"])


# ---- the runs of few labels --------------------------------------------------------------------------------

def arguments(root: Path, out: Path) -> argparse.Namespace:
    return argparse.Namespace(kind="beans", labels=60, data=str(root), out=out, teacher_weights="imagenet",
                              student_weights="imagenet")


def test_an_arm_differs_from_the_first_in_what_it_is_called_after(tmp_path, monkeypatch):
    root = toy.class_folders(tmp_path / "set", classes={"a": 40, "b": 40, "c": 40})
    dataset, args = open_dataset(str(root), say=lambda line: None), arguments(root, tmp_path / "out")
    monkeypatch.setattr(launch, "must_have_ended", lambda out: None)
    flags = {arm: cli.parse_config(train.Config, train.RECIPES, few_labels.flags_of(arm, 0, args, dataset), "")
             for arm in few_labels.ARMS}
    first = dataclasses.asdict(flags.pop("all"))
    assert (first["labels"], first["control"], first["kd_weight"], first["select"]) == (60, True, 1.0, "last")
    allowed = {"smoothing": {"kd_weight", "label_smoothing"}, "labelled": {"dataset", "labels"}, "hard": {"method"},
               "self": {"teacher", "teacher_size"}, "imagenet": {"teacher", "teacher_size"}, "patient-3": {"epochs"},
               "patient-10": {"epochs"}, "pretrained": {"student_weights", "lr"}}
    for arm, config in flags.items():
        changed = {name for name, value in dataclasses.asdict(config).items() if value != first[name]}
        names = allowed.get(arm, {"dataset", "labels"} | ({"kd_weight"} if arm.endswith("half") else set()))
        assert changed - {"teacher_weights", "teacher_epochs", "control"} <= names, arm
        assert (config.labels == 0) == (arm == "labelled" or arm.startswith("wrong"))
    assert flags["patient-10"].epochs == 10 * first["epochs"]

    args.kind = "caltech101"
    wrong = few_labels.flags_of("wrong-40-half", 0, args, dataset)
    assert cli.parse_config(train.Config, train.RECIPES, wrong, "").epochs == methods.EPOCHS


def test_the_labelled_folder_is_what_the_control_learns_from(tmp_path):
    root = toy.class_folders(tmp_path / "set", classes={"a": 40, "b": 40, "c": 40})
    dataset = open_dataset(str(root), say=lambda line: None)
    data = decode(dataset, size=16, crop_pct=1.0, interpolation="bilinear", cache_dir=tmp_path / "cache",
                  say=lambda line: None)
    control = by_role(data, 9, 0).control.train
    folder = few_labels.labelled_folder(dataset, 9, 0, tmp_path / "labelled")
    written = decode(open_dataset(str(folder), say=lambda line: None), size=16, crop_pct=1.0, interpolation="bilinear",
                     cache_dir=tmp_path / "cache", say=lambda line: None).train
    pictures = [Counter(zip((frame.tobytes() for frame in split.frames.read(range(len(split)))), split.labels.tolist()))
                for split in (control, written)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 9


def test_the_asked_for_share_of_labels_is_wrong_and_nothing_else(tmp_path):
    root = toy.class_folders(tmp_path / "set", classes={"a": 10, "b": 10, "c": 20})
    dataset = open_dataset(str(root), say=lambda line: None)
    true = [dataset.classes[label] for label in dataset.splits["train"].labels]
    wrong = {}
    for percent in (20, 40):
        folder = few_labels.wrong_folder(dataset, percent, 0, tmp_path / f"wrong-{percent}")
        given = {int(path.stem): path.parent.name for path in (folder / "train").rglob("*.jpg")}
        assert sorted(given) == list(range(40))
        wrong[percent] = {row: label for row, label in given.items() if label != true[row]}
        assert len(wrong[percent]) == 40 * percent // 100
        counts = Counter(path.parent.name for path in (folder / "test").rglob("*.jpg"))
        assert counts == {"a": 10, "b": 10, "c": 20}
    assert wrong[20].items() <= wrong[40].items()


# ---- folds -----------------------------------------------------------------------------------------------

def test_each_picture_is_tested_in_one_fold_and_seen_in_no_other_split_of_it(tmp_path):
    root = toy.class_folders(tmp_path / "set", {"train": {"a": 12, "b": 9}, "validation": {"a": 3, "b": 4},
                                                "test": {"a": 5, "b": 2}})
    dataset = open_dataset(str(root), say=lambda line: None)
    tested: Counter[bytes] = Counter()
    for fold in range(folds.FOLDS):
        written = folds.fold_folder(dataset, fold, tmp_path / f"fold-{fold}")
        splits = {split: {path.read_bytes() for path in (written / split).rglob("*.jpg")}
                  for split in ("train", "validation", "test")}
        assert len(set.union(*splits.values())) == sum(map(len, splits.values())) == 35
        assert Counter(path.parent.name for path in (written / "test").rglob("*.jpg")) == {"a": 4, "b": 3}
        tested.update(splits["test"])
    assert len(tested) == 35 and set(tested.values()) == {1}


# ---- launching -------------------------------------------------------------------------------------------

def test_nothing_learns_from_a_run_that_has_not_ended(tiny, tmp_path):
    stop_at_step(tiny, 8)
    with pytest.raises(SystemExit, match="make this run first"):
        launch.must_have_ended(Path(tiny.out))
    train.main(dataclasses.replace(tiny, resume=True))
    launch.must_have_ended(Path(tiny.out))


def test_a_run_that_fails_ends_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(train.__file__).parent)
    with pytest.raises(SystemExit, match="stopped with status 2; .*seed-0.log says why"):
        launch.train(["--epochs", "0"], tmp_path / "arm" / "seed-0", str(tmp_path / "cache"))
    assert "--epochs" in (tmp_path / "arm" / "seed-0.log").read_text()


def test_the_best_value_on_validation_is_chosen_and_of_two_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "TUNING", tmp_path / "tuning.json")
    (tmp_path / "tuning.json").write_text(json.dumps({"dist": {"4": 0.5, "2": 0.5, "1": 0.4}}))
    assert methods.chosen("dist") == ["--method", "dist", "--kd-weight", "0.5", "--temperature", "2"]


@pytest.mark.parametrize("kind", ["caltech101", "beans"])
def test_the_methods_differ_in_nothing_else_and_share_their_seeds_teacher(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(methods, "TUNING", tmp_path / "tuning.json")
    (tmp_path / "tuning.json").write_text(json.dumps({name: {value: 0.5 for value in values}
                                                      for name, (_, _, values) in methods.METHODS.items()}))
    monkeypatch.setattr(launch, "must_have_ended", lambda out: None)
    made: dict[Path, train.Config] = {}
    monkeypatch.setattr(launch, "train", lambda flags, out, cache_dir: made.update(
        {out: cli.parse_config(train.Config, train.RECIPES, list(flags), "")}))
    args = argparse.Namespace(kind=kind, data="set", teacher_weights="imagenet", teachers=tmp_path / "few",
                              out=tmp_path / "out", cache_dir="cache", seeds=[0, 1])
    methods.compare(list(methods.METHODS), args)
    assert len(made) == 2 * (1 + len(methods.METHODS)) and all(out.parent.parent == args.out for out in made)
    for seed in args.seeds:
        control = methods.folder_of("control", seed, args)
        teacher = tmp_path / "few" / f"beans-1034-all/seed-{seed}" if kind == "beans" else control
        for name in methods.METHODS:
            other = made[methods.folder_of(name, seed, args)]
            assert (other.teacher_weights, other.teacher_epochs) == (str(teacher / "teacher"), 0)
            pair = [dataclasses.asdict(config) for config in (made[control], other)]
            assert report.differing(pair).keys() <= arms.ALLOWED | arms.OF_THE_TEACHER, name


def test_a_step_is_timed_and_its_bytes_counted_for_every_kind_of_method(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "STEPS_A_ROUND", 2)
    shared = ["--dataset", str(photos), "--size", "32", "--teacher", "test_resnet", "--teacher-weights", "none",
              "--student", "test_efficientnet", "--cache-dir", str(tmp_path), "--device", "cpu", "--compile", "off"]
    kinds = {"control": ["--kd-weight", "0"], "control again": ["--kd-weight", "0"], "kd": [],
             "rkd": ["--method", "rkd"], "simkd": ["--method", "simkd", "--kd-weight", "1"]}
    found = steps.timed({name: [*shared, *own] for name, own in kinds.items()}, 2)["methods"]
    features = width(timm.create_model("test_resnet"))
    assert {name: row["bytes"] for name, row in found.items()} == {
        "control": 0, "control again": 0, "kd": 4 * 3, "rkd": 4 * (3 + features), "simkd": 4 * (3 + features)}
    assert all(row["milliseconds"] > 0 for row in found.values()) and found["control"]["times"] == 1
