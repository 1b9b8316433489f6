"""kd/few_labels.py: nested choices of labels, joined pictures, and a fair pair of control and student."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from kd import BadInput, few_labels
from kd.batches import count_batches
from kd.data.frames import Split, decode
from kd.data.sources import open_dataset, with_unlabelled
from kd.few_labels import JoinedFrames, by_role, keep_labels, rounds, usable_rows
from kd.losses import NO_LABEL
from kd.machine import checkpoint
from tests.helpers import toy
from tests.helpers.runs import identical, stop_at_step


def opened(root, cache, unlabelled=None):
    dataset = open_dataset(str(root), say=lambda line: None)
    if unlabelled:
        dataset = with_unlabelled(dataset, str(unlabelled), say=lambda line: None)
    return decode(dataset, size=16, crop_pct=1.0, interpolation="bilinear", cache_dir=cache, say=lambda line: None)


@pytest.fixture
def data(tmp_path):
    """A data set of 2 × 10 + 8 + 8 pictures, and 12 pictures without labels at two depths."""
    root = toy.class_folders(tmp_path / "set", {"train": {"a": 10, "b": 10}, "validation": {"a": 4, "b": 4},
                                                "test": {"a": 4, "b": 4}})
    others = toy.class_folders(tmp_path / "others", {"x": {"": 6}, "y": {"deep": 6}})
    return opened(root, tmp_path / "cache", others)


# ---- which labels are kept ---------------------------------------------------------------------------

@settings(deadline=None, derandomize=True, max_examples=50)
@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=6), seed=st.integers(0, 2 ** 32 - 1), data=st.data())
def test_smaller_choices_are_part_of_larger_ones_and_even_over_the_classes(counts, seed, data):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    small = data.draw(st.integers(len(counts), len(labels)))
    large = data.draw(st.integers(small, len(labels)))
    few, more = keep_labels(labels, small, seed), keep_labels(labels, large, seed)
    assert len(set(few.tolist())) == small and set(few) <= set(more)
    kept = np.bincount(labels[few], minlength=len(counts))
    # a class that has fewer than another has run out, or waits for its turn
    for one in range(len(counts)):
        assert kept[one] == counts[one] or kept[one] >= kept.max() - 1


def test_five_labels_of_each_class():
    labels = np.repeat(np.arange(101), np.arange(6, 107))
    kept = keep_labels(labels, 505, seed=3)
    assert np.bincount(labels[kept]).tolist() == [5] * 101
    assert not np.array_equal(kept, keep_labels(labels, 505, seed=4))


@pytest.mark.parametrize("count", [1, 21])
def test_too_few_and_too_many_labels(count):
    with pytest.raises(BadInput, match=f"^--labels {count}: must be at least 2, one for each class, and at most 20"):
        keep_labels(np.repeat([0, 1], 10), count, 0)


# ---- pictures ----------------------------------------------------------------------------------------

def test_joined_frames_are_the_frames_of_their_files(data):
    parts = [data.train.frames, data.unlabelled.frames]
    rows = np.array([25, 0, 31, 19, 20, 0])
    frames = JoinedFrames(parts, rows)
    expected = np.concatenate([part.read(range(len(part))) for part in parts])[rows]
    assert len(frames) == 6 and frames.shape == (6, 16, 16, 3)
    assert np.array_equal(frames.read(np.arange(6)), expected)
    out = np.zeros((2, 16, 16, 3), np.uint8)
    assert frames.read([4, 1], out) is out and np.array_equal(out, expected[[4, 1]])
    assert frames.digest != JoinedFrames(parts, rows[::-1]).digest


def test_a_round_that_is_not_full_has_all_classes():
    """Of 1,000 pictures that are sorted by class, 1.5 rounds show each class about half as often again."""
    labels = np.repeat(np.arange(10), 100)
    shown = rounds(np.arange(1000), 1500, seed=3)
    times = np.bincount(shown, minlength=1000)
    assert set(times) == {1, 2} and times.sum() == 1500
    by_class = np.bincount(labels[shown])
    assert by_class.min() > 130 and by_class.max() < 170
    assert not np.array_equal(shown, rounds(np.arange(1000), 1500, seed=4))


def test_without_these_flags_all_learn_from_train(data):
    assert by_role(data, 0, 0) == (data, data, data)


def test_what_each_role_learns_from(data):
    teacher, control, student = by_role(data, 6, 0, np.arange(12))
    kept = keep_labels(data.train.labels, 6, 0)
    assert teacher.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(teacher.train.frames.read(range(6)), data.train.frames.read(kept))

    assert len(student.train) == 32
    assert (student.train.labels != NO_LABEL).nonzero()[0].tolist() == kept.tolist()
    assert student.train.labels[kept].tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(student.train.frames.read(range(20)), data.train.frames.read(range(20)))
    assert np.array_equal(student.train.frames.read(range(20, 32)), data.unlabelled.frames.read(range(12)))

    assert count_batches(len(control.train), 8) == count_batches(len(student.train), 8)
    assert np.bincount(control.train.labels).sum() == 32 and NO_LABEL not in control.train.labels
    shown = {frame.tobytes() for frame in control.train.frames.read(range(32))}
    assert shown == {frame.tobytes() for frame in data.train.frames.read(kept)}
    for role in (teacher, control, student):
        assert role.validation is data.validation and role.test is data.test


def test_the_pictures_are_the_same_whatever_the_labels(data):
    """So the teacher's logits of a smaller choice are used again for a larger one."""
    digests = {by_role(data, count, seed, np.arange(12)).student.train.frames.digest
               for count, seed in ((6, 0), (6, 1), (12, 0), (0, 0))}
    assert len(digests) == 1


def test_pictures_of_other_splits_are_left_out_and_counted(tmp_path):
    root = toy.class_folders(tmp_path / "set")
    others = toy.class_folders(tmp_path / "others", {"": {"new": 5}})
    for number, source in enumerate(("test/cat/0.jpg", "validation/dog/3.jpg", "train/cat/7.jpg")):
        (others / f"{number}.jpg").write_bytes((root / source).read_bytes())
    said: list[str] = []
    data = opened(root, tmp_path / "cache", others)
    rows = usable_rows(data, said.append)
    assert rows is not None and rows.tolist() == [3, 4, 5, 6, 7]
    assert said == ["--unlabelled: 3 of 8 pictures are left out, because they are in train, validation or test as well"]
    with pytest.raises(BadInput, match="^--unlabelled: all of its 16 pictures are in train, validation or test"):
        usable_rows(opened(root, tmp_path / "cache", root / "test"))


def test_a_source_without_a_picture(tmp_path):
    root = toy.class_folders(tmp_path / "set")
    (tmp_path / "empty").mkdir()
    for source, match in (("empty", "holds no picture"), ("gone", "no such folder")):
        with pytest.raises(BadInput, match=f"^--unlabelled {tmp_path / source}: {match}"):
            with_unlabelled(open_dataset(str(root), say=lambda line: None), str(tmp_path / source))


def test_texts_beside_the_pictures_are_left_out_with_a_line(tmp_path):
    root, others = toy.class_folders(tmp_path / "set"), toy.class_folders(tmp_path / "others", {"": {"any": 5}})
    for name in ("metadata.csv", "LICENSE", "any/README.md", "any/notes.TXT"):
        (others / name).write_text("text")
    said: list[str] = []
    dataset = with_unlabelled(open_dataset(str(root), say=lambda line: None), str(others), say=said.append)
    assert len(dataset.splits["unlabelled"]) == 5
    assert said == ["others: left out: 4 files that are no pictures (LICENSE, README.md, notes.TXT, … 4 in all)"]


def test_tables_of_any_split_give_their_pictures(tmp_path):
    root = toy.class_folders(tmp_path / "set")
    table = toy.table(tmp_path / "table", {"breed": "class:3", "age": "class:2"}, ("train", "extra"), rows=7)
    dataset = with_unlabelled(open_dataset(str(root), say=lambda line: None), str(table))
    samples = dataset.splits["unlabelled"]
    assert samples.labels.tolist() == [-1] * 14
    read = {samples.read(i) for i in range(14)}
    assert read == {toy.encoded(toy.picture(f"{split}/{i}"), "PNG") for split in ("train", "extra") for i in range(7)}


# ---- whole runs --------------------------------------------------------------------------------------

def test_nothing_learns_from_unlabelled_pictures_without_a_teacher(tiny):
    with pytest.raises(BadInput, match="^--unlabelled: nothing learns from pictures without labels at --kd-weight 0"):
        train.main(dataclasses.replace(tiny, unlabelled="anything", kd_weight=0.0))


def test_few_labels_and_other_pictures_in_one_command(tiny, tmp_path, monkeypatch):
    """The control takes as many steps as the student; at λ = 1 the student reads no label."""
    others = toy.class_folders(tmp_path / "others", {"": {"any": 20}})
    config = dataclasses.replace(tiny, labels=9, unlabelled=str(others), control=True, kd_weight=1.0, select="last")
    seen: dict[str, list] = {}
    step = train.train_step

    def watched(model, optimizer, scaler, batch, teacher_logits, *rest):
        seen.setdefault("teacher" if teacher_logits is None else "student", []).append(batch.labels.tolist())
        return step(model, optimizer, scaler, batch, teacher_logits, *rest)

    monkeypatch.setattr(train, "train_step", watched)
    result = train.main(config)
    monkeypatch.undo()
    assert len(seen["student"]) == 2 * count_batches(42 + 20, 8)
    # one epoch of the teacher on 9 pictures, then the control's
    assert len(seen["teacher"]) == count_batches(9, 8) + len(seen["student"])
    assert all(label >= 0 for labels in seen["teacher"] for label in labels)
    assert {"teacher", "control", "student"} <= set(result)

    # λ = 1: without any label, the same student
    monkeypatch.setattr(few_labels, "by_role", lambda *given: _without_labels(by_role(*given)))
    again = train.main(dataclasses.replace(config, control=False, out=config.out + "-again"))
    assert again["student"] == result["student"] and again["teacher_batches"] == 0


def _without_labels(pictures: few_labels.ByRole) -> few_labels.ByRole:
    nothing = Split(pictures.student.train.frames, np.full(len(pictures.student.train), NO_LABEL))
    return pictures._replace(student=dataclasses.replace(pictures.student, train=nothing))


def test_a_stopped_run_with_few_labels_ends_with_the_same_bits(tiny):
    config = dataclasses.replace(tiny, labels=9, kd_weight=0.5, views=0, augment="crop", accumulate=2,
                                 control=True)
    whole = dataclasses.replace(config, out=config.out + "-whole")
    train.main(whole)

    steps = count_batches(9, 8) + 2 * count_batches(42, 8) + 3      # within the student's first epoch
    stop_at_step(config, steps)
    train.main(dataclasses.replace(config, resume=True))
    one, other = (checkpoint.read(Path(each.out) / "last.ckpt") for each in (whole, config))
    identical(one, other)


def test_the_last_epoch_is_kept_on_request(tiny):
    result = train.main(dataclasses.replace(tiny, epochs=4, select="last"))
    history = [json.loads(line) for line in (Path(tiny.out) / "metrics.jsonl").read_text().splitlines()]
    students = [entry["accuracy"] for entry in history if entry["role"] == "student"]
    assert result["student"]["validation_accuracy"] == students[-1]


def test_a_student_may_start_from_a_saved_model(tiny, trained):
    config, _ = trained
    start = f"{config.out}/student"
    result = train.main(dataclasses.replace(tiny, student_weights=start, epochs=1, lr=1e-9, control=True))
    before = train.models.open_saved(start)[0]
    after = train.models.open_saved(f"{tiny.out}/control")[0]
    weight = next(before.parameters())
    assert np.allclose(weight.detach().numpy(), next(after.parameters()).detach().numpy(), atol=1e-6)
    assert result["control"]["test_total"] == 12


def test_a_resumed_run_refuses_other_weights_of_the_student(tiny, trained, tmp_path):
    finished, _ = trained
    start = tmp_path / "start.safetensors"
    start.write_bytes(Path(finished.out, "student", "model.safetensors").read_bytes())
    config = dataclasses.replace(tiny, student_weights=str(start), control=True)
    stop_at_step(config, count_batches(42, 8) + 1)      # the teacher's epoch, and a step of the control
    start.write_bytes(start.read_bytes()[:-4] + np.float32(0.5).tobytes())      # another last weight
    with pytest.raises(BadInput, match="--resume: what --student-weights stands for has changed"):
        train.main(dataclasses.replace(config, resume=True))


def test_without_the_teachers_share_the_student_is_one_more_control(tiny):
    result = train.main(dataclasses.replace(tiny, labels=9, kd_weight=0.0, control=True))
    assert result["student"] == result["control"]
