"""The ladder: each rung trains, the ideas add up, and its JSON and its figure have what is promised."""

import json

import pytest
import torch

from kd import bench
from kd.bench import ladder, loop
from kd.config import Config


@pytest.fixture
def flags(photos, tmp_path):
    return ["--dataset", str(photos), "--size", "32", "--teacher", "test_resnet", "--student", "test_efficientnet",
            "--cache-dir", str(tmp_path), "--device", "cpu", "--rounds", "2", "--steps", "2"]


def test_the_json_has_every_rung_and_the_figure_its_factors(flags, tmp_path, capsys):
    figure = tmp_path / "ladder.svg"
    bench.main(["ladder", "--json", "--figure", str(figure), *flags])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rungs = result["rungs"]
    assert rungs[0]["name"] == "the tutorial's loop" and rungs[-1]["name"] == "the whole loop, views made in it"
    assert {"channels last in memory", "no wait for the loss", "the teacher's logits stored"} <= {
        rung["name"] for rung in rungs}
    assert rungs[0]["over_first"] == rungs[0]["over_previous"] == 1
    for rung in rungs:
        assert rung["img_s"] > 0 and rung["read"]
        for key in ("over_first", "over_previous"):
            low, high = rung[f"{key}_95"]
            assert 0 < low <= rung[key] <= high
    assert result["aa_ratio"] > 0 and result["bare_img_s"] > 0
    drawn = figure.read_text()
    assert all(f"× {rung['over_previous']:.2f}" in drawn and rung["name"] in drawn for rung in rungs[1:])
    shown = ladder.table(result).splitlines()
    assert [line[:34].strip() for line in shown[1:len(rungs) + 1]] == [rung["name"] for rung in rungs]


def test_every_idea_leaves_the_training_what_it_is(flags, tmp_path, monkeypatch):
    """The weights after two steps are those of the tutorial's loop, but for rounding; stored logits aside.

    AdamW moves a weight by the sign of a gradient that is almost 0, so a few weights may go the other way.
    """
    cfg = Config(dataset=flags[1], size=32, teacher="test_resnet", teacher_weights="none", student="test_efficientnet",
                 cache_dir=str(tmp_path), device="cpu", amp="off", lr=1e-3)
    made = loop.Bench(cfg, 2, tmp_path)
    pair = made.plain_models()
    monkeypatch.setattr(made, "plain_models", lambda: pair)
    trained = []
    real = torch.optim.AdamW

    def noted(parameters, **settings):
        trained.append(list(parameters))
        return real(trained[-1], **settings)

    monkeypatch.setattr(ladder.torch.optim, "AdamW", noted)
    rungs = ladder.rungs_of(made)[:-2]
    for place in range(len(rungs)):
        ladder.loop_of(set(rungs[:place + 1]), made, 2)()
    start, first, *others = (torch.cat([p.detach().flatten() for p in each]) for each in
                             (pair[0].parameters(), *trained))
    assert (first - start).norm() > 0.01
    for other in others:
        assert (other - first).norm() < 0.3 * (first - start).norm()
