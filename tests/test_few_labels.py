"""kd/few_labels.py: nested choices of labels, and a fair pair of control and student."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import train
from kd import NO_LABEL, BadInput
from kd.batches import count_batches
from kd.data.frames import Data
from kd.few_labels import by_role, keep_labels, rounds
from kd.machine import checkpoint
from tests.helpers import toy
from tests.helpers.frames import noise
from tests.helpers.runs import identical, stop_at_step

PICTURES = noise(40, 4)
TRAIN = PICTURES.take(np.arange(20), np.arange(20) // 10)
DATA = Data(("a", "b"), TRAIN, TRAIN, TRAIN, unlabelled=PICTURES.take(np.arange(28, 40)))


# ---- which labels are kept -------------------------------------------------------------------------------------------

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
    assert ((kept == counts) | (kept >= kept.max() - 1)).all()


def test_five_labels_of_each_class():
    labels = np.repeat(np.arange(101), np.arange(6, 107))
    kept = keep_labels(labels, 505, seed=3)
    assert np.bincount(labels[kept]).tolist() == [5] * 101
    assert kept[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]       # the results rest on this choice
    assert not np.array_equal(kept, keep_labels(labels, 505, seed=4))


@pytest.mark.parametrize("count", [1, 21])
def test_too_few_and_too_many_labels(count):
    with pytest.raises(BadInput, match=f"^--labels {count}: must be at least 2, one for each class, and at most 20"):
        keep_labels(np.repeat([0, 1], 10), count, 0)


def test_a_round_that_is_not_full_has_all_classes():
    """Of 1,000 pictures that are sorted by class, 1.5 rounds show each class about half as often again."""
    labels = np.repeat(np.arange(10), 100)
    shown = rounds(np.arange(1000), 1500, seed=3)
    times = np.bincount(shown, minlength=1000)
    assert set(times) == {1, 2} and times.sum() == 1500
    by_class = np.bincount(labels[shown])
    assert by_class.min() > 130 and by_class.max() < 170
    assert rounds(np.arange(10), 14, 3).tolist() == [9, 6, 0, 2, 1, 4, 7, 5, 3, 8, 9, 6, 0, 2]


# ---- what each role learns from --------------------------------------------------------------------------------------

def test_without_these_flags_all_learn_from_train():
    assert by_role(DATA, 0, 0) == (TRAIN, TRAIN, TRAIN)


def test_each_role_has_its_pictures_in_their_order():
    teacher, control, student = by_role(DATA, 6, 0, np.array([0, 2, 11]))
    kept = keep_labels(TRAIN.labels, 6, 0)
    assert teacher.rows.tolist() == kept.tolist() and teacher.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert student.rows.tolist() == [*range(20), 28, 30, 39]
    assert (student.labels != NO_LABEL).nonzero()[0].tolist() == kept.tolist()
    assert student.labels[kept].tolist() == [0, 0, 0, 1, 1, 1]
    assert control.rows.tolist() == rounds(kept, 23, 0).tolist() and set(control.rows) == set(kept)
    assert control.labels.tolist() == TRAIN.labels[control.rows].tolist()
    assert np.array_equal(control.read([22]), PICTURES.read(control.rows[22:]))


def test_the_pictures_are_the_same_whatever_the_labels():
    """So the teacher's logits of a smaller choice are used again for a larger one."""
    digests = {by_role(DATA, count, seed, np.arange(12)).student.digest
               for count, seed in ((6, 0), (6, 1), (12, 0), (0, 0))}
    assert len(digests) == 1


# ---- whole runs ------------------------------------------------------------------------------------------------------

def test_nothing_learns_from_unlabelled_pictures_without_a_teacher(tiny):
    with pytest.raises(BadInput, match="^--unlabelled: nothing learns from pictures without labels at --kd-weight 0"):
        train.main(dataclasses.replace(tiny, unlabelled="anything", kd_weight=0.0))


def test_few_labels_and_other_pictures_in_one_command(tiny, tmp_path, monkeypatch):
    """The control takes as many steps as the student, and only the student meets pictures without labels."""
    others = toy.class_folders(tmp_path / "others", {"": {"any": 20}})
    config = dataclasses.replace(tiny, labels=9, unlabelled=str(others), control=True, kd_weight=1.0, select="last")
    seen: dict[str, list] = {"without": [], "with": []}
    step = train.train_step

    def watched(model, optimizer, scaler, batch, teacher_outputs, *rest):
        seen["without" if teacher_outputs is None else "with"].extend(batch.labels.tolist())
        return step(model, optimizer, scaler, batch, teacher_outputs, *rest)

    monkeypatch.setattr(train, "train_step", watched)
    result = train.main(config)
    # --select last
    *_, last = (json.loads(line) for line in (Path(tiny.out) / "metrics.jsonl").read_text().splitlines())
    assert last["role"] == "student" and result["student"]["validation_accuracy"] == last["accuracy"]
    # two epochs of the student; one of the teacher on 9 pictures, and two of the control
    assert len(seen["with"]) == 2 * (42 + 20) and seen["with"].count(NO_LABEL) == 2 * (42 + 20 - 9)
    assert len(seen["without"]) == 9 + 2 * (42 + 20) and NO_LABEL not in seen["without"]


def test_a_stopped_run_with_few_labels_ends_with_the_same_bits(tiny):
    config = dataclasses.replace(tiny, labels=9, kd_weight=0.5, views=0, augment="crop", control=True)
    whole = dataclasses.replace(config, out=config.out + "-whole")
    train.main(whole)

    stop_at_step(config, count_batches(9, 8) + 2 * count_batches(42, 8) + 3)    # within the student's first epoch
    train.main(dataclasses.replace(config, resume=True))
    one, other = (checkpoint.read(Path(each.out) / "last.ckpt") for each in (whole, config))
    identical(one, other)


def test_a_student_may_start_from_a_saved_model(tiny, trained):
    start = Path(trained[0].out) / "student"
    train.main(dataclasses.replace(tiny, student_weights=str(start), epochs=1, lr=1e-9, control=True))
    before, after = (load_file(folder / "model.safetensors")["conv_stem.weight"]
                     for folder in (start, Path(tiny.out) / "control"))
    assert torch.allclose(before, after, atol=1e-6)


def test_a_resumed_run_refuses_other_weights_of_the_student(tiny, trained, tmp_path):
    start = tmp_path / "start.safetensors"
    start.write_bytes(Path(trained[0].out, "student", "model.safetensors").read_bytes())
    config = dataclasses.replace(tiny, student_weights=str(start), control=True)
    stop_at_step(config, count_batches(42, 8) + 1)      # the teacher's epoch, and a step of the control
    start.write_bytes(start.read_bytes()[:-4] + np.float32(0.5).tobytes())      # another last weight
    with pytest.raises(BadInput, match="--resume: what --student-weights stands for has changed"):
        train.main(dataclasses.replace(config, resume=True))


def test_without_the_teachers_share_the_student_is_one_more_control(tiny):
    result = train.main(dataclasses.replace(tiny, labels=9, kd_weight=0.0, control=True))
    assert result["student"] == result["control"]
