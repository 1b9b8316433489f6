"""The compiled loop computes what the plain one does, and has one graph for each size of a batch."""

import dataclasses

import pytest
import torch

from tests.gpu.watch import losses_of

pytestmark = pytest.mark.cuda


def test_compiled_and_plain_agree_over_20_steps_with_a_ragged_last_batch(tiny, tmp_path, monkeypatch, capsys):
    """An epoch of 42 pictures has 4 batches of 8 and one of 10."""
    symbolic: list[bool] = []
    real = torch._dynamo.lookup_backend

    def lookup_backend(name):
        backend = real(name)

        def note(graph, inputs, **options):
            sizes = [size for each in inputs if isinstance(each, torch.Tensor) for size in each.shape]
            symbolic.append(any(isinstance(size, torch.SymInt) for size in [*inputs, *sizes]))
            return backend(graph, inputs, **options)
        return note if name == "inductor" else backend

    config = dataclasses.replace(tiny, teacher_epochs=0, lr=1e-4, epochs=4)
    plain = losses_of(monkeypatch, dataclasses.replace(config, out=str(tmp_path / "plain")))
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lookup_backend)
    compiled = losses_of(monkeypatch, dataclasses.replace(config, compile="on", out=str(tmp_path / "compiled")))
    assert len(plain) == len(compiled) == 20 and "uncompiled" not in capsys.readouterr().out
    # the same algorithms in another order: some last bits at first, which then grow
    assert compiled[:3] == pytest.approx(plain[:3], rel=1e-4) and compiled == pytest.approx(plain, rel=1e-2)
    assert len(symbolic) >= 2 and not any(symbolic), "a graph for batches of any size"
