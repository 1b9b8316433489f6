"""The benchmark times the real loop; its tutorial is the tutorial; its JSON has the keys that are promised."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from kd import BadInput, bench
from kd.data.samples import Reading

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def flags(photos, tmp_path):
    return ["--dataset", str(photos), "--size", "32", "--teacher", "test_resnet", "--student", "test_efficientnet",
            "--cache-dir", str(tmp_path), "--compile", "off", "--device", "cpu", "--rounds", "2", "--steps", "3"]


def test_the_parts_are_the_whole(flags, capsys):
    bench.main(["--json", *flags])
    result = json.loads(capsys.readouterr().out)
    assert list(result["milliseconds"]) == ["view", "data", "normalise", "stored logits", "student forward",
                                            "loss", "backward and clipping", "optimizer"]
    assert result["teacher_milliseconds"] > 0
    assert abs(result["sum_over_wall"] - 1) < 0.03
    assert result["images_per_second"]["p20"] <= result["images_per_second"]["p80"]
    assert result["startup_seconds"] > 0 and result["peak_memory_mb"] > 50


def test_the_data_are_read_as_in_the_run(flags, monkeypatch):
    class Opened(Exception):
        pass

    def open_dataset(*arguments):
        raise Opened(*arguments)

    monkeypatch.setattr(train, "open_dataset", open_dataset)
    with pytest.raises(Opened) as asked:
        bench.main([*flags, "--config", "large", "--image", "photo", "--label", "kind", "--follow-links"])
    assert asked.value.args[1] == Reading(config="large", image="photo", label="kind", follow_links=True)


@pytest.mark.parametrize("method", [["--method", "simkd", "--kd-weight", "1"], ["--kd-weight", "0"]])
def test_a_method_on_features_and_a_control_are_timed_as_they_train(method, flags, capsys):
    bench.main(["--json", *flags, *method])
    result = json.loads(capsys.readouterr().out)
    assert (result["loss"] == "simkd") == ("simkd" in method)
    assert ("stored logits" in result["milliseconds"]) == ("simkd" in method)
    assert abs(result["sum_over_wall"] - 1) < 0.03 and result["images_per_second"]["p50"] > 0


def test_ranks_are_timed_together_and_what_they_say_to_each_other(flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "kd", "bench"]
    done = subprocess.run([*command, "--json", *flags], cwd=ROOT, capture_output=True, text=True, timeout=150,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result, = map(json.loads, done.stdout.splitlines())  # one of them speaks
    assert "× 2 ranks" in result["line"] and result["communication_milliseconds"] > 0
    assert result["images_per_second"]["p50"] > 0 and abs(result["sum_over_wall"] - 1) < 0.03


@pytest.mark.parametrize("arguments, said", [
    (["--rounds", "x"], "--rounds"), (["compare", "--rounds", "1"], "at least 2"),
    (["--teacher", "resnet5O"], "did you mean"), (["--sice", "3"], "--size"),
    (["--topk", "2"], "not part of what is timed"), (["--method", "pkt", "--kd-weight", "1"], "features only")])
def test_bad_arguments_are_refused(arguments, said, photos, tmp_path):
    with pytest.raises(BadInput, match=said):
        bench.main([*arguments, "--dataset", str(photos), "--cache-dir", str(tmp_path)])
