"""kd/data/sources.py: the same samples from every source, and nothing in a dataset is executed."""

import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kd import BadInput
from kd.data import leaves
from kd.data.samples import SPLITS
from kd.data.sources import open_dataset
from tests.helpers import standin_hub
from tests.helpers.opening import FULL, hub_folder, image_folder, jpeg, open_quietly, refused

BEANS = os.environ.get("KD_BEANS", "")
ROOT = Path(__file__).resolve().parents[2]


# The built-in set

def test_leaves_are_drawn():
    dataset = open_quietly("leaves")
    assert dataset.classes == leaves.CLASSES and list(dataset.splits) == list(SPLITS)
    for split, samples in dataset.splits.items():
        assert len(samples) == leaves.SIZES[split]
        for index in (0, 1, len(samples) - 1):
            picture, label = leaves.draw(split, index)
            drawn = samples.read(index)
            assert isinstance(drawn, Image.Image) and drawn.tobytes() == picture.tobytes()
            assert samples.labels[index] == label
    splits = dataset.splits.values()
    assert len({samples.location for samples in splits}) == 3


def test_leaves_need_no_datasets_library():
    code = ("import sys; sys.modules['datasets'] = None\n"
            "from kd.data.sources import open_dataset; open_dataset('leaves')")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    code = code.replace("'leaves'", "'beans'")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert "pip install datasets" in result.stderr.splitlines()[-1]


class Bomb:
    def __init__(self, flag: Path):
        self.flag = flag

    def __reduce__(self):
        return Path.touch, (self.flag,)


def test_nothing_in_a_dataset_is_executed(tmp_path):
    """A pickle under every name that some loader unpickles, and a loading script: refused or not even opened."""
    flag = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(flag))
    root = hub_folder(tmp_path / "script", {"train": [0, 1] * 9, "validation": [0, 1], "test": [0, 1]})
    (root / "script.py").write_text(f"open({str(flag)!r}, 'w')")
    refused(root, "script.py")
    for name in ("train-0.pkl", "train-0.parquet", "train-0.arrow", "dataset_info.json", "state.json", "train-0.npy"):
        root = hub_folder(tmp_path / name.replace(".", "_"), {"train": [0, 1] * 9, "validation": [0], "test": [0]})
        (root / "data" / name).write_bytes(bomb)
        try:
            open_dataset(str(root), say=lambda _: None)
        except BadInput:
            pass
    root = image_folder(tmp_path / "pictures", **FULL)
    (root / "train" / "a" / "x.pkl").write_bytes(bomb)
    open_dataset(str(root), say=lambda _: None).splits["train"].read(6)  # kd/data/decoding.py refuses it by name
    assert not flag.exists()


@pytest.mark.skipif(not BEANS, reason="KD_BEANS does not name the folder of the real photographs")
def test_real_photographs():
    dataset = open_quietly(BEANS)
    assert dataset.classes == ("angular_leaf_spot", "bean_rust", "healthy")
    assert {split: len(samples) for split, samples in dataset.splits.items()} == {
        "train": 1034, "validation": 133, "test": 128}
    last = dataset.splits["test"].read(127)
    assert isinstance(last, bytes) and Image.open(io.BytesIO(last)).size == (500, 500)


def test_an_empty_name_is_not_the_folder_that_one_works_in():
    refused("", "^--dataset is empty; give leaves, beans, a Hub id or a folder")


# The Hub

def test_names_that_are_nearly_known():
    for name in ("leafs", "leave", "bean"):
        refused(name, f"--dataset {name} is unknown .did you mean .*(leaves|beans)")


OPEN = textwrap.dedent("""
    import json, sys
    from kd import BadInput
    from kd.data.sources import open_dataset
    for name in sys.argv[1:]:
        lines = []
        try:
            dataset = open_dataset(name, say=lines.append)
            train = dataset.splits["train"]
            print(json.dumps([dataset.name, dataset.classes,
                              {split: samples.labels.tolist() for split, samples in dataset.splits.items()},
                              train.fingerprint, train.read(1).hex(), lines]))
        except BadInput as error:
            print(json.dumps(str(error)))
""")


def open_in_process(names: list[str], home: Path, endpoint: str, **variables: Path) -> list[Any]:
    """open_dataset in a process of its own, because the Hub's client reads its settings when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    environment |= {name: str(value) for name, value in variables.items()}
    result = subprocess.run([sys.executable, "-c", OPEN, *names], cwd=ROOT, env=environment, text=True,
                            capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub_answers(tmp_path_factory) -> dict[str, Any]:
    """What a stand-in Hub, which has only someone/toy, leads to: first online, then offline with the same cache."""
    folder = tmp_path_factory.mktemp("hub")
    served = hub_folder(folder / "served", {"train": [0, 1] * 9, "validation": [0, 1], "test": [1, 0]})
    server = standin_hub.serve(served, "someone/toy")
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    online = open_in_process(["someone/toy", "AI-Lab-Makerere/bean"], folder / "home", standin_hub.address_of(server))
    server.shutdown()
    server.server_close()
    offline = open_in_process(["someone/toy", "beans", "acme/leaves"], folder / "home", "http://127.0.0.1:9")
    return dict(zip(("online", "unknown", "offline", "unreachable", "acme/leaves"), online + offline, strict=True))


def test_hub_that_cannot_be_reached(hub_answers):
    message = hub_answers["unreachable"]
    assert isinstance(message, str) and "the Hub cannot be reached" in message
    assert "`python train.py --dataset leaves`" in message


def test_hub_dataset_by_its_id_and_then_offline_from_the_cache(hub_answers):
    online, offline = hub_answers["online"], hub_answers["offline"]
    assert online[:3] == ["someone/toy", ["a", "b"], {"train": [0, 1] * 9, "validation": [0, 1], "test": [1, 0]}]
    read = "someone/toy: images from column picture, labels from column label (ClassLabel); classes a, b"
    assert online[4:] == [jpeg(1).hex(), [read]]
    assert offline[:5] == online[:5]  # with the same fingerprint, so that its decoded pictures are dataset again
    assert offline[5] == ["someone/toy: the Hub cannot be reached; using the copy in its cache", read]


def test_hub_id_that_does_not_exist(hub_answers):
    message = hub_answers["unknown"]
    assert "neither a folder here nor a dataset on the Hub" in message
    assert "did you mean AI-Lab-Makerere/beans?" in message


def test_the_caches_of_the_hub_may_lie_anywhere(tmp_path):
    """A data set of loose pictures is read from the very files in the cache of the Hub's client."""
    served = image_folder(tmp_path / "served" / "data", **FULL)
    server = standin_hub.serve(served.parent, "someone/toy")
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    try:
        [answer] = open_in_process(["someone/toy"], tmp_path / "home", standin_hub.address_of(server),
                                   HF_HUB_CACHE=tmp_path / "hub", HF_DATASETS_CACHE=tmp_path / "tables")
    finally:
        server.shutdown()
        server.server_close()
    assert answer[:3] == ["someone/toy", ["a", "b"], {"train": [0] * 6 + [1] * 4, "validation": [0, 1, 1],
                                                      "test": [0, 0, 1]}]
    assert answer[4] == (served / "train" / "a" / "01.jpg").read_bytes().hex()


def test_ids_of_the_hub_are_not_compared_with_the_short_names(hub_answers):
    """`acme/leaves` is no misspelt `leaves`."""
    answer = hub_answers["acme/leaves"]
    assert "the Hub cannot be reached" in answer and "is unknown" not in answer
