"""kd/machine/hub.py: the Hub's real client against a stand-in on loopback."""

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
from huggingface_hub import constants

import train
from kd import BadInput, cli
from kd.machine import hub
from tests.conftest import tiny_config
from tests.helpers import standin_hub
from tests.helpers.runs import command_line

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "Secret" * 5


@pytest.fixture
def server(tmp_path):
    served = standin_hub.serve(tmp_path, "someone/data")
    threading.Thread(target=served.serve_forever, args=(.01,), daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture
def client(server, tmp_path, monkeypatch):
    """The client of this process, as if HF_ENDPOINT, HF_HOME and HF_TOKEN had been set before it was imported."""
    address = standin_hub.address_of(server)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def logits_and_labels(name: str) -> tuple[list[list[float]], list[str]]:
    """Of a model that timm finds under this name."""
    model = timm.create_model(name, pretrained=True).eval()
    torch.manual_seed(0)
    declared: Any = model.pretrained_cfg
    return model(torch.randn(2, 3, 32, 32)).tolist(), list(declared["label_names"])


def run(arguments: list[str], address: str, home: Path) -> subprocess.CompletedProcess[str]:
    """train.py in a process of its own, where the environment sets up the client."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
                    "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=100)


def test_a_student_goes_to_the_hub_and_timm_loads_it_from_there(tiny, server, client, tmp_path, monkeypatch):
    config = dataclasses.replace(tiny, push_to_hub="someone/student", push="every-epoch", private=True)
    address = standin_hub.address_of(server)
    done = run(command_line(config), address, tmp_path / "another home")
    assert done.returncode == 0, done.stderr
    student = Path(config.out) / "student"
    assert f"pushed {student} to {address}/someone/student" in done.stdout
    history = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    best, improved = -1.0, []
    for entry in history:
        if entry["role"] == "student" and entry["accuracy"] > best:
            best = entry["accuracy"]
            improved.append(f"kd: epoch {entry['epoch']}")
    assert server.commits == [*improved, "kd: the student of a finished run"]
    assert server.private == {"someone/student": True}

    # the whole folder and nothing else was pushed, and the token is in nothing that was written, printed or pushed
    pushed = server.models["someone/student"]
    assert pushed == {path.name: path.read_bytes() for path in student.iterdir()}
    assert set(pushed) == {"README.md", "config.json", "model.safetensors"}
    written = [path for path in Path(config.out).rglob("*") if path.is_file()]
    assert len(written) > 8 and not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in done.stdout + done.stderr

    monkeypatch.delenv("HF_TOKEN")
    downloaded = logits_and_labels("hf-hub:someone/student")
    assert downloaded == logits_and_labels(f"local-dir:{student}")
    assert downloaded[1] == ["blob", "plain", "stripes"]
    assert list((tmp_path / "home" / "hub").rglob("model.safetensors"))  # it came over the network


@pytest.mark.parametrize("refuse, token, message", [
    ({}, "", "no login; run `hf auth login` or set HF_TOKEN"),
    ({"/api/repos/create": 401}, TOKEN, "401"),
    ({"/preupload/": 403}, TOKEN, "403 Forbidden"),
    ({"/api/repos/create": 500}, TOKEN, "500"),
    ({"/api/repos/create": 0}, TOKEN, "disconnected"),
    ({"/commit/": 503}, TOKEN, "503"),
    ({"/commit/": -1}, TOKEN, "did not take it within 1 s"),
], ids=["no login", "401", "403", "500", "hung up", "503", "no answer"])
def test_an_upload_that_fails_is_one_line(server, client, tmp_path, monkeypatch, refuse, token, message):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(hub, "UPLOAD_SECONDS", 1.0 if -1 in refuse.values() else 60.0)
    server.refuse = refuse
    outcome = hub.push_folder(str(folder), "someone/student", "a message", private=True)
    assert outcome.startswith("not pushed: ") and "\n" not in outcome and message in outcome
    assert str(folder) in outcome and TOKEN not in outcome and not server.commits


def test_a_run_whose_uploads_fail_ends_as_any_other(photos, tmp_path, server, client, capsys):
    config = dataclasses.replace(tiny_config(photos, tmp_path), epochs=1, teacher_epochs=0,
                                 push_to_hub="someone/student", push="every-epoch")
    server.refuse = {"/api/repos/create": 403}
    cli.run(train.main, config)
    printed = capsys.readouterr().out
    assert printed.count("not pushed: ") == 2
    result = json.loads((Path(config.out) / "result.json").read_text())
    assert json.loads(printed.splitlines()[-1]) == result

    server.refuse = {}  # the run is finished, and is pushed all the same
    cli.run(train.main, dataclasses.replace(config, resume=True))
    assert "nothing to do\npushed " in capsys.readouterr().out
    assert server.commits == ["kd: the student of a finished run"]


@pytest.mark.parametrize("repo, message", [
    ("a/b/c", "names no repository"), ("my student", "names no repository"),
    (TOKEN, "is an access token"), (f"someone/{TOKEN}", "is an access token")])
def test_a_repository_that_cannot_be_is_refused_before_training(tiny, repo, message):
    with pytest.raises(BadInput, match=message) as caught:
        train.main(dataclasses.replace(tiny, push_to_hub=repo))
    assert TOKEN not in str(caught.value) and not Path(tiny.out).exists()
