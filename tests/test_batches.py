"""Batches: every sample once an epoch, never a single one, and shares of ranks that are the whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.augmentations import AUGMENTATIONS
from kd.batches import count_batches, epoch_batches, load_batches
from kd.machine import distributed
from kd.views import Views, load_views
from tests.helpers.frames import noise

CPU = torch.device("cpu")
SPLIT = noise(23)       # whose labels are 0, 1, 2, 0, 1, 2, ...


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(2, 200), st.integers(2, 40), st.integers(0, 2**32), st.integers(0, 300))
def test_an_epoch_meets_every_sample_once_and_never_alone(samples, batch_size, seed, epoch):
    batches = epoch_batches(seed, epoch, samples, batch_size)
    assert sorted(np.concatenate(batches)) == list(range(samples))
    least = min(samples, max(2, batch_size / 2))
    assert all(least <= len(batch) <= 1.5 * batch_size for batch in batches)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert len(batches) <= -(-samples // batch_size)
    again = epoch_batches(seed, epoch, samples, batch_size)
    assert all(np.array_equal(one, two) for one, two in zip(batches, again, strict=True))


def test_epochs_and_seeds_shuffle_differently():
    orders = [np.concatenate(epoch_batches(seed, epoch, 50, 8)).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(2, 200), st.integers(2, 40), st.integers(0, 300))
def test_every_epoch_has_as_many_steps(samples, batch_size, epoch):
    assert count_batches(samples, batch_size) == len(epoch_batches(3, epoch, samples, batch_size))


def test_a_batch_holds_the_views_labels_and_stored_answers_of_its_samples():
    views = Views(3, 32, AUGMENTATIONS["crop"], 2)

    def stored(view, samples):
        return torch.from_numpy(samples * 10.0 + view) if 7 in samples else None

    batches = list(load_batches(SPLIT, views, 5, 4, 0, CPU, stored))
    assert len(batches) == count_batches(23, 4)
    assert sorted(np.concatenate([batch.samples for batch in batches])) == list(range(23))
    for batch in batches:
        assert batch.view == 1 and batch.split is SPLIT and (batch.total, batch.weight) == (len(batch.samples), 1.0)
        assert torch.equal(batch.pixels, load_views(SPLIT, batch.samples, 1, views, CPU))
        assert batch.labels.tolist() == (batch.samples % 3).tolist()
        expected = (batch.samples * 10 + 1).tolist() if 7 in batch.samples else None
        assert (batch.stored if batch.stored is None else batch.stored.tolist()) == expected


def test_a_resumed_epoch_goes_on_with_the_batches_that_are_left():
    views = Views(0, 32, AUGMENTATIONS["flip"], 0)
    whole, rest = (list(load_batches(SPLIT, views, 2, 4, start, CPU)) for start in (0, 3))
    assert len(rest) == len(whole) - 3
    for one, other in zip(whole[3:], rest, strict=True):
        assert np.array_equal(one.samples, other.samples) and torch.equal(one.pixels, other.pixels)


def test_the_weights_of_unequal_shares_average_to_one(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        shares.append(list(load_batches(SPLIT, Views(0, 32, AUGMENTATIONS["none"], 1), 0, 8, 0, CPU)))
    for one, other in zip(*shares, strict=True):
        assert one.total == other.total == len(one.samples) + len(other.samples)
        assert (one.weight + other.weight) / 2 == pytest.approx(1)
        assert one.weight / other.weight == pytest.approx(len(one.samples) / len(other.samples))
    assert {one.total for one in shares[0]} == {8, 7}
