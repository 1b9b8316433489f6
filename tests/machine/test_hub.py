"""The Hub both ways, by its real client against a stand-in on loopback; the model card by the client's own parser."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

import train
from kd import BadInput, cli
from kd.tools import card
from tests.helpers import standin_hub
from tests.helpers.runs import command_line

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "Secret" * 5

PUSH = """
import sys
from kd import hub
hub.PATIENCE = 3.0
print(hub.push_folder(sys.argv[1], "someone/student", "a message", private=True))
"""


def answer(name: str) -> list[Any]:
    """The logits of a model that timm finds under this name, and its labels."""
    model = timm.create_model(name, pretrained=True).eval()
    torch.manual_seed(0)
    declared: Any = model.pretrained_cfg
    return [model(torch.randn(2, 3, 32, 32)).tolist(), list(declared["label_names"])]


@pytest.fixture
def server(tmp_path):
    served = standin_hub.serve(tmp_path, "someone/data")
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def run(arguments: list[str], address: str, home: Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """A process of its own, for the client reads its settings once, when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
                    "HF_HUB_DISABLE_XET": "1"} | ({"HF_TOKEN": token} if token else {})
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, text=True, capture_output=True,
                          timeout=100)


def test_a_student_goes_to_the_hub_and_timm_loads_it_from_there(tiny, server, tmp_path):
    config = dataclasses.replace(tiny, push_to_hub="someone/student", push="every-epoch", private=True)
    address = standin_hub.address_of(server)
    done = run(["train.py", *command_line(config)], address, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    student = Path(config.out) / "student"
    assert f"pushed {student} to {address}/someone/student" in done.stdout
    history = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    best, improved = -1.0, []
    for entry in history:
        if entry["role"] == "student" and entry["accuracy"] > best:
            best = entry["accuracy"]
            improved.append(f"kd: epoch {entry['epoch']}")
    assert server.commits == [*improved, "kd: the best student by validation accuracy"]
    assert server.private == {"someone/student": True}

    # that folder, all of it, and nothing else; and the token is in nothing that was written, said or pushed
    pushed = server.models["someone/student"]
    assert pushed == {path.name: path.read_bytes() for path in student.iterdir()}
    assert set(pushed) == {"README.md", "config.json", "model.safetensors"}
    written = [path for path in Path(config.out).rglob("*") if path.is_file()]
    assert len(written) > 8 and not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in done.stdout + done.stderr

    ask = "import json; from tests.machine.test_hub import answer; print(json.dumps(answer('hf-hub:someone/student')))"
    there = run(["-c", ask], address, tmp_path / "another home", token="")
    assert there.returncode == 0, there.stderr
    assert json.loads(there.stdout) == answer(f"local-dir:{student}")
    assert json.loads(there.stdout)[1] == ["blob", "plain", "stripes"]


@pytest.mark.parametrize("refuse, token, said", [
    ({}, "", "no login; run `hf auth login` or set HF_TOKEN"),
    ({"/api/repos/create": 401}, TOKEN, "401"),
    ({"/preupload/": 403}, TOKEN, "403 Forbidden"),
    ({"/api/repos/create": 500}, TOKEN, "500"),
    ({"/api/repos/create": 0}, TOKEN, "disconnected"),
    ({"/commit/": 503}, TOKEN, "503"),
    ({"/commit/": -1}, TOKEN, "did not take it within 3 s"),
], ids=["no login", "401", "403", "500", "hung up", "503", "no answer"])
def test_an_upload_that_fails_is_one_line(server, tmp_path, refuse, token, said):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    server.refuse = refuse
    done = run(["-c", PUSH, str(folder)], standin_hub.address_of(server), tmp_path / "home", token)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("not pushed: ") and done.stdout.count("\n") == 1 and said in done.stdout
    assert str(folder) in done.stdout and TOKEN not in done.stdout and not server.commits


def test_a_run_whose_uploads_fail_ends_as_any_other(tiny, server, tmp_path):
    config = dataclasses.replace(tiny, epochs=1, teacher_epochs=0, push_to_hub="someone/student", push="every-epoch")
    server.refuse = {"/api/repos/create": 403}
    done = run(["train.py", *command_line(config)], standin_hub.address_of(server), tmp_path / "home")
    assert done.returncode == 0 and done.stdout.count("not pushed: ") == 2
    result = json.loads((Path(config.out) / "result.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result

    server.refuse = {}  # the run is finished, and is pushed all the same
    again = run(["train.py", *command_line(config, "--resume")], standin_hub.address_of(server), tmp_path / "home")
    assert again.returncode == 0 and "nothing to do\npushed " in again.stdout
    assert server.commits == ["kd: the best student by validation accuracy"]


@pytest.mark.parametrize("repo, said", [("a/b/c", "names no repository"), ("my student", "names no repository"),
                                        (TOKEN, "is an access token"), (f"someone/{TOKEN}", "is an access token")])
def test_a_repository_that_cannot_be_is_refused_before_training(tiny, repo, said):
    with pytest.raises(BadInput, match=said) as caught:
        train.main(dataclasses.replace(tiny, push_to_hub=repo))
    assert TOKEN not in str(caught.value) and not Path(tiny.out).exists()


# The model card

ROW = {"test_accuracy": 0.75, "test_correct": 96, "test_total": 128, "test_macro_f1": 0.7421}
ROWS = {"teacher": {**ROW, "test_accuracy": 0.96875, "test_correct": 124}, "control": ROW,
        "student": {**ROW, "test_accuracy": 0.8125, "test_correct": 104}}


def parsed(text: str) -> Any:
    """Read as the Hub's client reads it, and held to what its validator is known to ask for."""
    found = ModelCard(text)
    meta = yaml.safe_load(text.split("---\n")[1])
    assert found.data.to_dict() == meta
    assert meta["license"] == "apache-2.0" and meta["library_name"] == "timm"
    assert meta["pipeline_tag"] == "image-classification" and meta["metrics"] == ["accuracy", "f1"]
    for model in meta.get("model-index", []):
        for result in model["results"]:
            assert result["task"]["type"] == "image-classification"
            assert isinstance(result["dataset"]["type"], str) and isinstance(result["dataset"]["name"], str)
            assert all(isinstance(metric["value"], float) for metric in result["metrics"])
    assert meta.get("base_model_relation") in (None, "adapter", "finetune", "merge", "quantized")
    return found


def test_the_card_of_each_role_says_what_it_is_and_what_it_comes_from():
    config = train.Config(recipe="tutorial", push_to_hub="someone/student", control=True, seed=3, kd_weight=0.7)
    student = parsed(train.model_card(config, "student", ROWS))
    assert student.data.base_model == "timm/resnet50.a1_in1k" and student.data.datasets == ["AI-Lab-Makerere/beans"]
    assert "base_model_relation" not in student.data.to_dict()
    assert [(one.metric_type, one.metric_value) for one in student.data.eval_results] == [("accuracy", 0.8125),
                                                                                          ("f1", 0.7421)]
    assert {(one.dataset_type, one.dataset_split) for one in student.data.eval_results} == {
        ("AI-Lab-Makerere/beans", "test")}
    for said in ("| teacher | `resnet50` | 96.9 % (124/128) | 0.742 |",
                 "| control | `mobilenetv2_100` | 75.0 % (96/128) | 0.742 |",
                 "| student | `mobilenetv2_100` | 81.2 % (104/128) | 0.742 |", "T = 5, λ = 0.7", "used once",
                 "\npython train.py --recipe tutorial --seed 3 --kd-weight 0.7 --control\n",
                 'timm.create_model("hf-hub:someone/student", pretrained=True)', "local-dir:", "label_names",
                 "create_transform", "one is 0.78 points"):
        assert said in student.content, said
    teacher = parsed(train.model_card(config, "teacher", ROWS))
    assert teacher.data.base_model == "timm/resnet50.a1_in1k" and teacher.data.base_model_relation == "finetune"
    assert teacher.data.eval_results[0].metric_value == 0.96875 and "# resnet50 on beans" in teacher.content
    control = parsed(train.model_card(config, "control", ROWS))
    assert control.data.base_model is None and control.data.eval_results[0].metric_value == 0.75
    own = dataclasses.replace(config, teacher_weights="weights/x.safetensors")
    assert parsed(train.model_card(own, "student", ROWS)).data.base_model is None


def test_the_card_of_data_on_this_machine_names_no_path_and_no_stranger(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    config = train.Config(recipe="tutorial", dataset=str(folder), teacher_weights=str(tmp_path / "w.safetensors"),
                          out=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), push_to_hub="a/b", device="cpu")
    found = parsed(train.model_card(config, "student", {}))  # nothing was scored yet
    assert str(tmp_path) not in found.content and found.data.datasets is None and found.data.eval_results is None
    assert "\npython train.py --recipe tutorial --dataset photos --teacher-weights w.safetensors\n" in found.content


def test_the_card_is_written_with_validation_scores_and_at_the_end_with_test_scores(tiny, monkeypatch):
    cards: list[str] = []
    text = card.render_card

    def kept(*given, **named) -> str:
        cards.append(text(*given, **named))
        return cards[-1]

    monkeypatch.setattr(card, "text", kept)
    result = train.main(dataclasses.replace(tiny, control=True))
    assert len(cards) >= 6
    for one in map(parsed, cards[:-3]):
        assert {found.dataset_split for found in one.data.eval_results} == {"validation"}
        assert "Scores on the validation split" in one.content and "Training was not over" in one.content
    for role in ("teacher", "control", "student"):
        last = parsed((Path(tiny.out) / role / "README.md").read_text())
        values = {one.metric_type: (one.metric_value, one.dataset_split) for one in last.data.eval_results}
        assert values == {"accuracy": (result[role]["test_accuracy"], "test"),
                          "f1": (result[role]["test_macro_f1"], "test")}
        for other in ("teacher", "control", "student"):
            assert f"({result[other]['test_correct']}/12)" in last.content


def test_the_command_gives_the_config_again():
    for words in (["--recipe", "tutorial"], ["--seed", "4", "--control", "--lr", "0.01"],
                  ["--recipe", "best", "--teacher", "tf_efficientnet_lite0", "--augment", "crop", "--views", "0"]):
        config = cli.parse_config(train.Config, train.RECIPES, words, "")
        told = cli.command(config, train.RECIPES, train.FREE_ON_RESUME)
        assert told.startswith("python train.py")
        assert cli.parse_config(train.Config, train.RECIPES, told.split()[2:], "") == config
    assert cli.command(train.Config(dataset="a/b c/d"), {}, set()).endswith("--dataset d")
    assert [cli.base_name(one) for one in ("someone/toy", "/x/beans", "~/beans", "./b", "imagenet", "a/b/c")] == [
        "someone/toy", "beans", "beans", "b", "imagenet", "c"]
