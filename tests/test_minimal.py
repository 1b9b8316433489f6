"""kd/minimal.py is train.py without its conveniences: the same first epochs, to the bit."""

import re

import pytest

import train
from kd import cli, minimal
from kd.data import leaves

FEW = {"train": 48, "validation": 9, "test": 9}


def test_its_first_epoch_is_that_of_train_py_without_kernels(tmp_path, monkeypatch, capsys, page_not_drawn):
    """The loss of every step, of teacher, control and student, on some of the leaves in small."""
    monkeypatch.setattr(minimal, "SIZE", 32)
    monkeypatch.setattr(cli, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(leaves, "SIZES", FEW)
    losses: dict[str, list[float]] = {"ours": [], "train.py": []}

    def noting(name, function):
        def noted(*arguments, **more):
            loss = function(*arguments, **more)
            losses[name].append(loss.item())
            return loss
        return noted

    monkeypatch.setattr(minimal, "kd_loss", noting("ours", minimal.kd_loss))
    monkeypatch.setattr(train, "kd_loss", noting("train.py", train.kd_loss))
    minimal.main([])
    said = capsys.readouterr().out
    result = train.main(train.Config.of(
        "demo", size=32, control=True, kernels="off", amp="off", device="cpu", allow_weak_teacher=True,
        out=tmp_path / "run", cache_dir=tmp_path / "cache"))
    assert losses["ours"] == losses["train.py"] and len(losses["ours"]) == 3 * (4 + 8 + 8)
    for role in ("teacher", "control", "student"):
        row = result[role]
        assert re.search(rf"^{role} .*\({row['test_correct']}/9\)$", said, re.MULTILINE)


def test_it_knows_no_flags():
    with pytest.raises(cli.BadInput, match="unrecognized arguments: --epochs"):
        minimal.main(["--epochs", "3"])
