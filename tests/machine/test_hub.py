"""kd/machine/hub.py: the Hub's real client against a stand-in on loopback."""

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants

import train
from kd import BadInput
from kd.machine import hub
from tests.helpers import standin_hub

TOKEN = "hf_" + "Secret" * 5


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub, and the client of this process as if HF_ENDPOINT, HF_HOME and HF_TOKEN had been set before its import."""
    served = standin_hub.serve(tmp_path, "someone/data")
    threading.Thread(target=served.serve_forever, args=(.01,), daemon=True).start()
    address = standin_hub.address_of(served)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield served
    served.shutdown()
    served.server_close()


def logits_and_labels(name: str) -> tuple[list[list[float]], list[str]]:
    """Of a model that timm finds under this name."""
    model = timm.create_model(name, pretrained=True).eval()
    torch.manual_seed(0)
    declared: Any = model.pretrained_cfg
    return model(torch.randn(2, 3, 32, 32)).tolist(), list(declared["label_names"])


def test_a_student_goes_to_the_hub_and_timm_loads_it_from_there(tiny, server, tmp_path, monkeypatch, capfd):
    config = dataclasses.replace(tiny, epochs=1, teacher_epochs=0, push_to_hub="someone/student")
    server.refuse = {"/api/repos/create": 403}
    result = train.main(config)     # ends as any other run
    student = Path(config.out) / "student"
    assert f"; {student} is complete\n" in capfd.readouterr().out
    assert json.loads((Path(config.out) / "result.json").read_text()) == result and not server.commits

    server.refuse = {}  # the run is finished, and is pushed all the same
    train.main(dataclasses.replace(config, resume=True))
    printed = capfd.readouterr()
    assert f"pushed {student} to {constants.ENDPOINT}/someone/student\n" in printed.out
    assert server.commits == ["kd: the student of a finished run"]

    # the whole folder and nothing else was pushed, and the token is in nothing that was written, printed or pushed
    pushed = server.models["someone/student"]
    assert pushed == {path.name: path.read_bytes() for path in student.iterdir()}
    assert set(pushed) == {"README.md", "config.json", "model.safetensors"}
    written = [path for path in Path(config.out).rglob("*") if path.is_file()]
    assert len(written) > 8 and not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in printed.out + printed.err

    monkeypatch.delenv("HF_TOKEN")
    downloaded = logits_and_labels("hf-hub:someone/student")
    assert downloaded == logits_and_labels(f"local-dir:{student}")
    assert downloaded[1] == ["blob", "plain", "stripes"]
    assert list((tmp_path / "home" / "hub").rglob("model.safetensors"))  # it came over the network


@pytest.mark.parametrize("refuse, token, message", [
    ({}, "", "no login; run `hf auth login` or set HF_TOKEN"),
    ({"/preupload/": 403}, TOKEN, "403 Forbidden"),
    ({"/api/repos/create": 500}, TOKEN, "500"),
    ({"/api/repos/create": 0}, TOKEN, "disconnected"),
    ({"/commit/": 503}, TOKEN, "503"),
], ids=["no login", "403", "500", "hung up", "503"])
def test_an_upload_that_fails_is_one_line(server, tmp_path, monkeypatch, refuse, token, message):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    monkeypatch.setenv("HF_TOKEN", token)
    server.refuse = refuse
    outcome = hub.push_folder(str(folder), "someone/student", "a message")
    assert outcome.startswith("not pushed: ") and "\n" not in outcome and message in outcome
    assert outcome.endswith(f"; {folder} is complete") and TOKEN not in outcome and not server.commits


@pytest.mark.parametrize("repo, message", [("a/b/c", "names no repository"), ("my student", "names no repository"),
                                           (f"someone/{TOKEN}", "is an access token")])
def test_a_repository_that_cannot_be_is_refused_before_training(tiny, repo, message):
    with pytest.raises(BadInput, match=message) as caught:
        train.main(dataclasses.replace(tiny, push_to_hub=repo))
    assert TOKEN not in str(caught.value) and not Path(tiny.out).exists()
