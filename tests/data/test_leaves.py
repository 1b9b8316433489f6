"""kd/data/leaves.py: a picture is a function of its key, and no trivial statistic tells the classes."""

import hashlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kd.data import leaves

KEYS = st.tuples(st.sampled_from(sorted(leaves.SIZES)), st.integers(0, 149), st.integers(0, 2 ** 64 - 1))
SIDE = 48  # of the pictures whose statistics are taken: they do not depend on the resolution


def digest(key: tuple[str, int, int], side: int = 32) -> str:
    return hashlib.sha256(leaves.draw(*key, side)[0].tobytes()).hexdigest()


def small(key: tuple[str, int]) -> np.ndarray:
    split, index = key
    return np.asarray(leaves.draw(split, index, side=SIDE)[0])


@pytest.fixture(scope="module")
def pictures() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Half of train and all of test: (N, SIDE, SIDE, 3) uint8, (N,) labels."""
    drawn = {}
    for split, count in (("train", 540), ("test", leaves.SIZES["test"])):
        drawn[split] = np.stack([small((split, i)) for i in range(count)]), np.arange(count) % 3
    return drawn


@settings(deadline=None, derandomize=True, max_examples=20)
@given(keys=st.lists(KEYS, min_size=2, max_size=4, unique=True))
def test_a_picture_depends_on_its_key_and_not_on_what_was_drawn_before(keys):
    np.random.seed(1)
    forwards = [digest(key) for key in keys]
    np.random.seed(2)
    backwards = [digest(key) for key in reversed(keys)]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == len(keys)


def test_another_process_draws_the_same_bytes():
    keys = [("train", 0), ("validation", 1), ("test", 2)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        there = list(pool.map(small, keys))
    assert all(np.array_equal(mine, small(key)) for key, mine in zip(keys, there))


def test_no_picture_comes_twice_within_or_across_splits_or_seeds(pictures):
    digests = [hashlib.sha256(picture.tobytes()).hexdigest() for drawn, _ in pictures.values() for picture in drawn]
    digests += [digest(("validation", index, 0), SIDE) for index in range(60)]
    digests += [digest((split, index, 1), SIDE) for split in leaves.SIZES for index in range(60)]
    assert len(digests) == 780 + 4 * 60 == len(set(digests))


def test_the_split_changes_the_scene_and_not_only_the_noise():
    first, second = (np.asarray(leaves.draw(split, 0, side=32)[0], float) for split in ("train", "test"))
    assert np.abs(first - second).mean() > 5


def test_classes_are_balanced_in_every_split_and_in_every_run_of_three():
    assert leaves.CLASSES == ("angular_leaf_spot", "bean_rust", "healthy")
    for split, size in leaves.SIZES.items():
        assert size % len(leaves.CLASSES) == 0
        assert [leaves.draw(split, index, side=16)[1] for index in range(6)] == [0, 1, 2, 0, 1, 2]
        assert leaves.draw(split, size - 1, side=16)[1] == 2


@settings(deadline=None, derandomize=True, max_examples=25)
@given(key=KEYS, side=st.integers(16, 130))
def test_any_side_gives_a_picture_of_that_size(key, side):
    split, index, seed = key
    image, label = leaves.draw(split, index, seed, side)
    assert (image.mode, image.size) == ("RGB", (side, side))
    assert label == index % 3
    assert np.asarray(image).std() > 4  # not blank


def test_the_side_changes_the_resolution_and_not_the_scene():
    for index in range(12):
        large = leaves.draw("test", index)[0]
        assert large.size == (256, 256)
        shrunk = np.asarray(large.resize((64, 64), Image.Resampling.BOX), float)
        drawn = np.asarray(leaves.draw("test", index, side=64)[0], float)
        other = np.asarray(leaves.draw("test", index + 3, side=64)[0], float)
        assert np.abs(shrunk - drawn).mean() < .5 * np.abs(shrunk - other).mean()


@pytest.mark.parametrize("arguments, error, message", [
    (("val", 0), ValueError, "train, validation, test"),
    (("train", -1), IndexError, "outside of split 'train'"),
    (("test", leaves.SIZES["test"]), IndexError, f"has {leaves.SIZES['test']} pictures"),
    (("test", 0, 0, 8), ValueError, "choose 16 or more"),
])
def test_what_cannot_be_drawn_is_an_error_with_a_reason(arguments, error, message):
    with pytest.raises(error, match=message):
        leaves.draw(*arguments)


@pytest.mark.parametrize("index", range(6))
def test_the_disease_is_on_the_leaf_and_the_rest_of_the_scene_is_the_same(monkeypatch, index):
    """The same key with another class: the background agrees, the pictures differ in marks on the leaf."""
    monkeypatch.setattr(leaves, "_photograph", lambda rng, canvas: canvas)  # the camera comes last
    paint_leaf = leaves._paint_leaf

    def redrawn(label):
        def paint(rng, canvas, leaf, colour, light, real_label=None, severity=0.):
            before = canvas.copy()
            paint_leaf(rng, canvas, leaf, colour, light, real_label if real_label is None else label, severity)
            if real_label is not None:
                painted.append((before, canvas.copy()))
        painted: list[tuple[np.ndarray, np.ndarray]] = []
        monkeypatch.setattr(leaves, "_paint_leaf", paint)
        leaves.draw("test", index, side=128)
        return painted[0]  # the first leaflet: later ones lie at other random numbers

    under, healthy = redrawn(leaves.HEALTHY)
    same, spotted = redrawn(leaves.ANGULAR)
    rusty = redrawn(leaves.RUST)[1]
    assert np.array_equal(under, same)
    untouched = (healthy == under).all(axis=0)
    for diseased in (spotted, rusty):
        changed = np.abs(diseased - healthy).max(axis=0) > .02
        assert changed.sum() > 50
        assert not (changed & untouched).any()


def statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """What can be read off a picture without looking at shapes, per picture: (N, features)."""
    pixels = images.reshape(len(images), -1, 3).astype(np.float32) / 255
    red, green, blue = pixels.transpose(2, 0, 1)
    code = (images // 64).astype(int) @ np.array([16, 4, 1])
    histogram = np.stack([np.bincount(codes.ravel(), minlength=64) for codes in code]) / code[0].size
    grey = images.mean(axis=-1) / 255
    across, down = (np.abs(np.diff(grey, axis=axis)).reshape(len(images), -1) for axis in (1, 2))
    features = {
        "mean and standard deviation": np.concatenate([pixels.mean(1), pixels.std(1)], axis=1),
        "colour histogram": np.sqrt(histogram),
        "brown and yellow": np.stack([((red > 1.05 * green) & (green > blue)).mean(1),
                                      ((red > .5) & (green > .5) & (blue < .4)).mean(1)], axis=1),
        "edge energy": np.stack([across.mean(1), down.mean(1), across.std(1), down.std(1),
                                 (across > .1).mean(1)], axis=1),
    }
    return features | {"all together": np.concatenate(list(features.values()), axis=1)}


def accuracy(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    """The better of a ridge classifier and of the nearest centroid, on test."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    centroids = np.stack([train[labels == label].mean(0) for label in range(3)])
    nearest = ((test[:, None] - centroids) ** 2).sum(-1).argmin(1)
    weights = np.linalg.solve(train.T @ train + 10 * np.eye(train.shape[1]), train.T @ np.eye(3)[labels])
    return max(float((nearest == truth).mean()), float(((test @ weights).argmax(1) == truth).mean()))


def test_no_global_statistic_tells_the_classes(pictures):
    train, test = (statistics(pictures[split][0]) for split in ("train", "test"))
    for name in train:
        reached = accuracy(train[name], pictures["train"][1], test[name], pictures["test"][1])
        assert reached < .70, f"{name}: {reached:.2f}"


def test_the_linear_classifier_does_learn_what_is_there_to_learn(pictures):
    """The bar above means something: the same classifier reads a plain statistic where there is one."""
    (images, labels), (unseen, truth) = (pictures[split] for split in ("train", "test"))
    tinted = [np.clip(x + 60. * np.eye(3)[y][:, None, None], 0, 255).astype(np.uint8)
              for x, y in ((images, labels), (unseen, truth))]
    train, test = (statistics(x)["mean and standard deviation"] for x in tinted)
    assert accuracy(train, labels, test, truth) > .9


def test_scenes_vary(pictures):
    means = pictures["train"][0].mean(axis=(1, 2))
    assert (means.std(axis=0) > 15).all()  # light, soil and foliage
    for label in range(3):  # and as much in every class
        assert (means[pictures["train"][1] == label].std(axis=0) > 15).all()
