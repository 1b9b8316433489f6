"""Views: the same key makes the same bits, whatever else is in the batch; and the pixels are the right ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.augmentations import AUGMENTATIONS, FLIP_X, Augmentation
from kd.data.frames import center_crop
from kd.views import Views, crop_boxes, load_views, make_views, uniforms
from tests.helpers.fake_cuda import CUDA, fake_cuda
from tests.helpers.frames import noise

FRAMES = noise(40).read(range(40))


def views(samples, *, seed=0, view=0, name="crop", size=32):
    return load_views(noise(40), np.asarray(samples), view,
                      Views(seed, size, AUGMENTATIONS[name], 0), torch.device("cpu"))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(0, 39), min_size=1, max_size=20), st.integers(0, 2**40), st.integers(0, 500),
       st.sampled_from(sorted(AUGMENTATIONS)))
def test_a_view_does_not_depend_on_its_batch(samples, seed, view, name):
    together = views(samples, seed=seed, view=view, name=name)
    for place, sample in enumerate(samples):
        assert torch.equal(together[place], views([sample], seed=seed, view=view, name=name)[0])


def test_another_seed_sample_or_view_is_another_picture():
    frames = np.repeat(FRAMES[:1], 2, axis=0)
    one, other = make_views(torch.from_numpy(frames), np.array([0, 1]), 0, Views(0, 32, AUGMENTATIONS["crop"], 0))
    assert not torch.equal(one, other)
    assert not torch.equal(views([3]), views([3], seed=1))
    assert not torch.equal(views([3]), views([3], view=1))


@pytest.mark.parametrize("size", range(29, 37))
def test_without_augmentation_a_view_is_the_centre_crop_of_evaluation(size):
    expected = center_crop(FRAMES[:5], size).transpose(0, 3, 1, 2)
    for view in (0, 7):
        assert np.array_equal(views(range(5), view=view, name="none", size=size).numpy(), expected)


@pytest.mark.parametrize("name, reorderings", [("flip", [(), (1,), (2,), (1, 2)]), ("flip-x", [(), (2,)])])
def test_a_flip_only_reorders_the_centre_crop(name, reorderings):
    plain, flipped = views(range(40), name="none"), views(range(40), name=name)     # (sample, channel, row, column)
    kinds = [next(dims for dims in reorderings if torch.equal(flipped[i], plain[i].flip(dims))) for i in range(40)]
    assert set(kinds) == set(reorderings)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 2**40), st.integers(0, 500))
def test_a_left_right_flip_is_the_mirror_of_the_view_without_flips(seed, view):
    samples = np.arange(8)
    mirrored = uniforms(seed, samples, view)[:, FLIP_X] < 0.5
    for name, plain_name in (("flip-x", "none"), ("crop-x", "crop-only")):
        made, plain = (views(samples, seed=seed, view=view, name=each).int() for each in (name, plain_name))
        for i in samples:
            difference = (made[i] - (plain[i].flip(2) if mirrored[i] else plain[i])).abs()
            assert difference.max() <= (1 if "crop" in name else 0)     # resampling may round the other way


def test_only_flips_both_ways_turn_a_crop_upside_down():
    ramp = np.zeros((1, 64, 64, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(64), np.arange(64)[:, None]      # red grows to the right, green downwards
    found = {}
    for name in ("crop-only", "crop-x", "crop"):
        keys = Views(3, 32, AUGMENTATIONS[name], 0)
        drawn = [make_views(torch.from_numpy(ramp), np.array([0]), view, keys)[0].float() for view in range(40)]
        mirrored = {bool(made[0, :, -1].mean() < made[0, :, 0].mean()) for made in drawn}
        upside_down = {bool(made[1, -1].mean() < made[1, 0].mean()) for made in drawn}
        found[name] = mirrored, upside_down
    assert found == {"crop-only": ({False}, {False}), "crop-x": ({False, True}, {False}),
                     "crop": ({False, True}, {False, True})}


def test_a_crop_of_a_ramp_shows_the_box_that_was_drawn():
    # red is the column, green the row: bilinear sampling of a ramp is exact, so pixels tell where they come from
    ramp = np.zeros((1, 200, 200, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200), np.arange(200)[:, None]
    drawn = Views(3, 50, Augmentation(crop=0.35), 0)
    for view in range(20):
        made = make_views(torch.from_numpy(ramp), np.array([0]), view, drawn)[0].numpy()
        left, top, width, height = (float(v[0]) for v in crop_boxes(uniforms(3, np.array([0]), view, 10)[:, :4], 0.35))
        for axis, (start, extent) in enumerate([(left, width), (top, height)]):
            at = (start + (np.arange(50) + 0.5) / 50 * extent) * 200 - 0.5
            row = made[axis, 10, :] if axis == 0 else made[axis, :, 10]
            assert np.abs(row - np.clip(at, 0, 199)).max() <= 0.51


def test_boxes_stay_inside_and_cover_the_range():
    left, top, width, height = crop_boxes(uniforms(0, np.arange(5000), 0, 4), 0.35)
    assert (left >= 0).all() and (top >= 0).all() and (left + width <= 1 + 1e-12).all()
    assert (top + height <= 1 + 1e-12).all()
    area = width * height
    assert area.min() >= 0.25 and 0.34 < np.quantile(area, 0.02) < 0.40 and area.max() > 0.97


def test_the_uniforms_are_uniform_and_uncorrelated():
    draw = uniforms(1, np.arange(20000), 5, 3)
    assert draw.min() >= 0 and draw.max() < 1
    assert np.abs(draw.mean(0) - 0.5).max() < 0.01 and np.abs(draw.var(0) - 1 / 12).max() < 0.002
    columns = np.concatenate([draw, uniforms(2, np.arange(20000), 5, 1), uniforms(1, np.arange(20000), 6, 1),
                              np.roll(draw[:, :1], 1, axis=0)], axis=1)
    assert np.abs(np.corrcoef(columns.T) - np.eye(6)).max() < 0.03


def test_the_uniforms_are_the_hash_that_the_docstring_names():
    # again, in Python's own whole numbers; stored logits and resumed runs depend on these very bits
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def finaliser(state: int) -> int:
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        return state ^ state >> 31

    key = finaliser(7 * golden + 1 & mask)
    key = finaliser(key ^ (2 * golden + 2 & mask))
    key = finaliser(key ^ (3 * golden + 3 & mask))
    expected = [(finaliser(key + golden * j & mask) >> 11) / 2**53 for j in (1, 2)]
    assert uniforms(7, np.array([3]), 2, 2).tolist() == [expected]
    assert expected == [0.45700621794983787, 0.4691868232533729]


@pytest.mark.parametrize("count, epochs, indices", [(0, 4, [0, 1, 2, 3]), (1, 3, [0, 0, 0]), (3, 5, [0, 1, 2, 0, 1]),
                                                    (8, 3, [0, 1, 2])])
def test_epochs_go_round_the_views(count, epochs, indices):
    drawn = Views(0, 32, AUGMENTATIONS["crop"], count)
    assert [drawn.index(epoch) for epoch in range(epochs)] == indices
    assert drawn.used(epochs) == len(set(indices))


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_on_a_gpu_the_host_never_waits_for_the_making_of_views(name, monkeypatch):
    with fake_cuda(monkeypatch) as log:
        made = load_views(noise(40), np.arange(4), 0, Views(0, 32, AUGMENTATIONS[name], 0), CUDA)
    assert made.device == CUDA and made.shape == (4, 3, 32, 32)
    assert "aten._to_copy.default" in log.operators and log.blocking == log.reads == 0
