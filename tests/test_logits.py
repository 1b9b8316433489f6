"""kd/logits.py: a row is what the teacher gave, to the bit, or it is absent."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kd import BadInput, TrainingFault, logits
from kd.logits import LogitStore, pack, unpack

ROWS = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))


def store(folder: Path, key: dict | None = None) -> LogitStore:
    return LogitStore(folder, key or {"teacher": "a"}, columns=5)


def fill(folder: Path, view: int = 0) -> LogitStore:
    filled = store(folder)
    filled.put(view, np.arange(20), ROWS)
    filled.flush()
    return filled


def test_a_hit_returns_the_same_bits_also_in_another_order_and_another_store(tmp_path):
    fill(tmp_path)
    order = np.random.default_rng(1).permutation(20)
    stored = store(tmp_path).get(0, order)
    assert stored is not None and torch.equal(stored, ROWS[order])


def test_what_was_not_put_is_absent(tmp_path):
    half = store(tmp_path)
    half.put(0, np.arange(10), ROWS[:10])
    assert half.get(0, np.arange(3)) is None  # nothing is written before flush
    half.flush()
    assert half.get(0, np.arange(10)) is not None
    assert half.get(0, np.array([9, 10])) is None and half.get(1, np.arange(3)) is None


def test_what_waits_to_be_written_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(logits, "PENDING", 7 * 20)  # bytes: seven rows
    filled = store(tmp_path)
    filled.put(0, np.arange(7), ROWS[:7])
    assert filled.get(0, np.arange(7)) is None
    filled.put(0, np.arange(7, 9), ROWS[7:9])
    stored = filled.get(0, np.arange(9))
    assert stored is not None and torch.equal(stored, ROWS[:9])
    filled.put(0, np.arange(9, 12), ROWS[9:12])
    assert filled.get(0, np.arange(9, 12)) is None


def test_what_is_not_a_number_is_not_stored(tmp_path):
    rows = ROWS.clone()
    rows[3, 2] = float("nan")
    filled = store(tmp_path)
    filled.put(0, np.arange(20), rows)
    filled.flush()
    assert filled.get(0, np.array([3])) is None and filled.get(0, np.array([2, 4])) is not None


def test_another_key_is_another_store(tmp_path):
    fill(tmp_path)
    assert store(tmp_path, {"teacher": "b"}).get(0, np.arange(20)) is None


def test_every_flipped_bit_is_noticed(tmp_path):
    path = fill(tmp_path).folder / "view-0.rows"
    whole, width = path.read_bytes(), 5 * 4 + 4
    for bit in np.random.default_rng(2).choice(8 * len(whole), 200, replace=False):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        row, reopened = bit // 8 // width, store(tmp_path)
        assert reopened.get(0, np.array([row])) is None
        others = np.delete(np.arange(20), row)
        stored = reopened.get(0, others)
        assert stored is not None and torch.equal(stored, ROWS[others])


def test_a_row_cannot_pass_for_its_neighbour_for_another_view_or_for_one_of_zeros(tmp_path):
    filled = fill(tmp_path)
    path, width = filled.folder / "view-0.rows", 5 * 4 + 4
    content = path.read_bytes()
    (filled.folder / "view-1.rows").write_bytes(content)
    path.write_bytes(content[width:2 * width] + content[width:-width] + bytes(width))     # row 1 in the place of row 0
    reopened = store(tmp_path)
    assert reopened.get(0, np.array([0])) is None and reopened.get(0, np.array([1])) is not None
    assert reopened.get(1, np.array([1])) is None and reopened.get(0, np.array([19])) is None


def test_a_truncated_file_loses_its_rows_and_nothing_else(tmp_path):
    path = fill(tmp_path).folder / "view-0.rows"
    path.write_bytes(path.read_bytes()[:10 * 24 + 7])
    reopened = store(tmp_path)
    assert reopened.get(0, np.arange(10)) is not None and reopened.get(0, np.array([10])) is None


def test_batches_that_are_computed_are_counted_and_other_batches_of_the_same_samples_are_read(tmp_path):
    first = store(tmp_path)
    for batch in np.split(np.random.default_rng(3).permutation(20), [8, 16]):
        assert first.get(0, batch) is None
        assert torch.equal(first.put(0, batch, ROWS[batch]), ROWS[batch])
    first.flush()
    assert first.teacher_batches == 3
    second = store(tmp_path)
    for batch in np.split(np.arange(20), [5, 10, 15]):
        stored = second.get(0, batch)
        assert stored is not None and torch.equal(stored, ROWS[batch])
    assert second.teacher_batches == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "logits").write_text("a file")
    with pytest.raises(BadInput, match="--cache-dir"):
        store(tmp_path / "logits")


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_top_k_keep_their_probability_and_the_others_share_the_rest_evenly(temperature):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 4
    rows = pack(logits, 7, temperature)
    assert rows.shape == (6, 15) and rows.dtype == torch.float32
    full, top = unpack(rows, 40), logits.topk(7).indices
    exact, approximate = (z.double().div(temperature).softmax(1) for z in (logits, full))
    assert torch.allclose(approximate.gather(1, top), exact.gather(1, top), rtol=1e-5)
    assert torch.allclose(full.gather(1, top), logits.gather(1, top).float())
    outside, others = 1 - exact.gather(1, top).sum(1), approximate.scatter(1, top, 0)
    assert torch.allclose(others.sum(1), outside, rtol=1e-3)
    assert torch.allclose(others.max(1).values, outside / 33, rtol=1e-3)


def test_a_store_of_the_top_k_gives_the_same_when_computed_and_when_read(tmp_path):
    first = LogitStore(tmp_path, {}, 5, topk=2, temperature=5.0)
    computed = first.put(0, np.arange(20), ROWS)
    first.flush()
    second = LogitStore(tmp_path, {}, 5, topk=2, temperature=5.0)
    stored = second.get(0, np.arange(20))
    assert stored is not None and torch.equal(stored, computed) and not torch.equal(computed, ROWS)
    assert LogitStore(tmp_path, {}, 5, topk=2, temperature=1.0).get(0, np.arange(20)) is None
    assert LogitStore(tmp_path, {}, 5, topk=3, temperature=5.0).get(0, np.arange(20)) is None
    assert (first.folder / "view-0.rows").stat().st_size == 20 * (5 * 4 + 4)


def test_a_full_disk_is_one_line_and_what_was_written_stays_right(tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def full(descriptor, data, offset):
        calls.append(offset)
        if len(calls) > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    filling = store(tmp_path)
    filling.put(0, np.arange(20), ROWS)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TrainingFault, match="--cache-dir: cannot write the logit store .* No space left"):
        filling.flush()
    reopened = store(tmp_path)
    stored = reopened.get(0, np.arange(7))
    assert stored is not None and torch.equal(stored, ROWS[:7]) and reopened.get(0, np.array([7])) is None
