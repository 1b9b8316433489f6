"""The logit store: a row is what the teacher gave, to the bit, or it is not known."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kd import BadInput, TrainingFault, logits
from kd.logits import LogitStore, pack, spread, unpack

ROWS = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))


def store(folder: Path, key: dict | None = None) -> LogitStore:
    return LogitStore(folder, key or {"teacher": "a"}, samples=20, classes=5)


def fill(folder: Path, view: int = 0) -> LogitStore:
    filled = store(folder)
    filled.put(view, np.arange(20), ROWS)
    filled.flush()
    return filled


def test_a_hit_returns_the_very_bits_also_in_another_order_and_process(tmp_path):
    fill(tmp_path)
    order = np.random.default_rng(1).permutation(20)
    found = store(tmp_path).get(0, order)
    assert found is not None and torch.equal(found, ROWS[order])


def test_what_was_not_put_is_not_known(tmp_path):
    half = store(tmp_path)
    half.put(0, np.arange(10), ROWS[:10])
    assert half.get(0, np.arange(3)) is None  # remembered, but nothing is written before flush
    half.flush()
    assert half.get(0, np.arange(10)) is not None
    assert half.get(0, np.array([9, 10])) is None and half.get(1, np.arange(3)) is None


def test_what_waits_to_be_written_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(logits, "PENDING", 7 * 20)  # bytes: seven rows
    filled = store(tmp_path)
    filled.put(0, np.arange(7), ROWS[:7])
    assert filled.get(0, np.arange(7)) is None
    filled.put(0, np.arange(7, 9), ROWS[7:9])
    found = filled.get(0, np.arange(9))
    assert found is not None and torch.equal(found, ROWS[:9])
    filled.put(0, np.arange(9, 12), ROWS[9:12])
    assert filled.get(0, np.arange(9, 12)) is None


def test_what_was_read_does_not_stay_resident(tmp_path):
    """A view of 150 MB: read as a whole, in its order, it must not be in memory as a whole."""
    def resident() -> float:
        return int(Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0]) / 1024

    samples, batch = 38_400, 128
    big = LogitStore(tmp_path, {"teacher": "big"}, samples, 1000)
    rows = torch.randn(batch, 1000)
    for start in range(0, samples, batch):
        big.put(0, np.arange(start, start + batch), rows)
    big.flush()
    before = most = resident()
    for start in range(0, samples, batch):
        found = big.get(0, np.arange(start, start + batch))
        assert found is not None and torch.equal(found, rows)
        most = max(most, resident())
    assert 30 < most - before < 80


def test_what_is_not_a_number_is_not_remembered(tmp_path):
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
    folder = fill(tmp_path).folder
    generator = np.random.default_rng(2)
    for name in ("view-0.f32", "view-0.sum"):
        whole = (folder / name).read_bytes()
        for bit in generator.choice(8 * len(whole), 100, replace=False):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(damaged)
            row = bit // 8 // (20 if name.endswith("f32") else 8)
            again = store(tmp_path)
            assert again.get(0, np.array([row])) is None
            others = np.delete(np.arange(20), row)
            found = again.get(0, others)
            assert found is not None and torch.equal(found, ROWS[others])
        (folder / name).write_bytes(whole)


def test_a_row_cannot_pass_for_its_neighbour_or_for_another_view(tmp_path):
    filled = fill(tmp_path)
    for name in ("f32", "sum"):
        path = filled.folder / f"view-0.{name}"
        width = path.stat().st_size // 20
        content = path.read_bytes()
        (filled.folder / f"view-1.{name}").write_bytes(content)
        path.write_bytes(content[width:2 * width] + content[width:])  # row 1 in the place of row 0
    again = store(tmp_path)
    assert again.get(0, np.array([0])) is None and again.get(0, np.array([1])) is not None
    assert again.get(1, np.array([1])) is None


def test_a_truncated_file_loses_its_rows_and_nothing_else(tmp_path):
    path = fill(tmp_path).folder / "view-0.f32"
    path.write_bytes(path.read_bytes()[:10 * 20 + 7])
    again = store(tmp_path)
    assert again.get(0, np.arange(10)) is not None and again.get(0, np.array([10])) is None


def test_the_teacher_is_asked_only_for_what_is_not_known(tmp_path):
    first, calls = store(tmp_path), []

    def ask(samples: np.ndarray) -> torch.Tensor:
        calls.append(len(samples))
        return ROWS[samples]

    for batch in np.split(np.random.default_rng(3).permutation(20), [8, 16]):
        first.logits(0, batch, first.get(0, batch), lambda: ask(batch))
    first.flush()
    assert calls == [8, 8, 4] and first.teacher_batches == 3
    second = store(tmp_path)
    for batch in np.split(np.arange(20), [5, 10, 15]):
        answer = second.logits(0, batch, second.get(0, batch), lambda: ask(batch))
        assert torch.equal(answer, ROWS[batch])
    assert len(calls) == 3 and second.teacher_batches == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "logits").write_text("a file")
    with pytest.raises(BadInput, match="--cache-dir"):
        store(tmp_path / "logits")


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_largest_logits_keep_their_probability_and_the_others_share_theirs(temperature):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 4
    rows = pack(logits, 7, temperature)
    dropped = spread(rows, 40, temperature)
    assert rows.shape == (6, 15) and rows.dtype == torch.float32
    full, kept = unpack(rows, 40), logits.topk(7).indices
    exact, ours = (z.double().div(temperature).softmax(1) for z in (logits, full))
    assert torch.allclose(ours.gather(1, kept), exact.gather(1, kept), rtol=1e-5)
    assert torch.allclose(dropped.double(), 1 - exact.gather(1, kept).sum(1), rtol=1e-4)
    assert torch.allclose(full.gather(1, kept), logits.gather(1, kept).float())
    others = ours.scatter(1, kept, 0)
    assert torch.allclose(others.sum(1), dropped.double(), rtol=1e-4)
    assert torch.allclose(others.max(1).values, dropped.double() / 33, rtol=1e-4)


def test_a_store_of_the_largest_gives_the_same_live_and_later(tmp_path):
    first = LogitStore(tmp_path, {}, 20, 5, keep=2, temperature=5.0)
    live = first.logits(0, np.arange(20), None, lambda: ROWS)
    first.flush()
    again = LogitStore(tmp_path, {}, 20, 5, keep=2, temperature=5.0)
    found = again.get(0, np.arange(20))
    assert found is not None and torch.equal(found, live) and not torch.equal(live, ROWS)
    assert again.dropped_share() == first.dropped_share() and 0 < again.dropped_share() < 1  # type: ignore[operator]
    assert LogitStore(tmp_path, {}, 20, 5, keep=2, temperature=1.0).get(0, np.arange(20)) is None
    assert LogitStore(tmp_path, {}, 20, 5, keep=3, temperature=5.0).get(0, np.arange(20)) is None
    assert (first.folder / "view-0.f32").stat().st_size == 20 * 5 * 4


def test_a_full_disk_is_one_line_and_what_was_written_stays_right(tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def full(descriptor, data, offset):
        calls.append(offset)
        if len(calls) > 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    filling = store(tmp_path)
    filling.put(0, np.arange(20), ROWS)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TrainingFault, match="--cache-dir: cannot write the logit store .* No space left"):
        filling.flush()
    again = store(tmp_path)
    found = again.get(0, np.arange(7))
    assert found is not None and torch.equal(found, ROWS[:7]) and again.get(0, np.array([7])) is None
