"""The benchmark of the loss measures what it says, on shapes small enough to be quick."""
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd import BadInput
from kd.bench import loss
from train import kd_loss


def test_tutorial_ops_are_the_reference():
    """What the fused loss is timed against computes the same number, as the tutorial's modules do."""
    s, t, labels = torch.randn(6, 9), torch.randn(6, 9), torch.arange(6)
    kl = nn.KLDivLoss(reduction="batchmean")(F.log_softmax(s / 5.0, dim=-1), F.softmax(t / 5.0, dim=-1)) * 5.0 ** 2
    assert torch.equal(loss.tutorial_loss(s, t, labels, 5.0, 0.5), 0.5 * F.cross_entropy(s, labels) + 0.5 * kl)
    theirs, ours = loss.tutorial_loss(s, t, labels, 5.0, 0.5), kd_loss(s, t, labels, 5.0, 0.5)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)


def test_json_rows(capsys, monkeypatch):
    # Inductor takes four seconds for each shape: it compiles the first, a faster backend the second.
    compile, backends = torch.compile, iter(["inductor"])
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=next(backends, "eager"), **options))
    loss.main(["--json", "--device", "cpu", "--shapes", "64x500,4x3", "--rounds", "3"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["shape"] for row in rows] == [[64, 500], [4, 3]]
    for row in rows:
        assert row["dtype"] == "float32"
        for name in ("eager", "compiled", "fused", "floor"):
            low, high = row[f"{name}_ms_p20_p80"]
            assert 0 < low <= row[f"{name}_ms"] <= high
    assert all(row["aa_ratio"] > 0 and row["over_floor"] > 0 for row in rows)


@pytest.mark.parametrize("argv, named", [
    (["--shapes", "3"], "--shapes 3"), (["--shapes", "0x3"], "--shapes 0x3"), (["--rounds", "1"], "--rounds 1"),
    (["--dtype", "int8"], "--dtype"), (["--speed"], "--speed")])
def test_bad_arguments(argv, named):
    with pytest.raises(BadInput, match=named):
        loss.main(argv)
