"""kd/data/sources.py, samples.py and splits.py: the same samples from every source, always three splits,
and nothing in a dataset is executed.
"""

import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kd import BadInput
from kd.data import leaves
from kd.data.samples import SPLITS, Dataset, Samples
from kd.data.sources import open_dataset
from kd.data.splits import with_three_splits
from tests.helpers import standin_hub

datasets = pytest.importorskip("datasets")
BEANS = os.environ.get("KD_BEANS", "")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """No test reads or fills the user's cache of datasets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE)


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def image_folder(root: Path, **splits: dict[str, int]) -> Path:
    shade = 0
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number:02}.jpg").write_bytes(jpeg(shade % 256))
                shade += 1
    return root


def hub_folder(root: Path, splits: dict[str, list], labels=None, features=None, image="picture") -> Path:
    """Parquet files with a column `picture`, and `label` as given; the card is the one that the Hub would show."""
    (root / "data").mkdir(parents=True)
    labels = labels or datasets.ClassLabel(names=["a", "b"])
    features = features or datasets.Features({"id": datasets.Value("string"), image: datasets.Image(), "label": labels})
    for split, values in splits.items():
        rows = [{image: {"bytes": jpeg(number), "path": f"{number}.jpg"}, "label": value, "id": str(number)}
                for number, value in enumerate(values)]
        columns = {name: [row.get(name) for row in rows] for name in features}
        datasets.Dataset.from_dict(columns, features).to_parquet(root / "data" / f"{split}-00000.parquet")
    card = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in splits)
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{card}---\n# toy\n")
    return root


FULL = {"train": {"a": 6, "b": 4}, "validation": {"a": 1, "b": 2}, "test": {"a": 2, "b": 1}}


def open_quietly(name, seed=0):
    return open_dataset(str(name), seed, say=lambda line: pytest.fail(line))


def refused(name, match: str) -> str:
    with pytest.raises(BadInput, match=match) as caught:
        open_dataset(str(name), say=lambda _: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The built-in set

def test_leaves_are_one_data_set_whatever_the_seed():
    for seed in (0, 7):
        dataset = open_quietly("leaves", seed)
        assert dataset.classes == leaves.CLASSES and list(dataset.splits) == list(SPLITS)
        for split, samples in dataset.splits.items():
            assert len(samples) == leaves.SIZES[split]
            for index in (0, 1, len(samples) - 1):
                picture, label = leaves.draw(split, index)
                assert samples.labels[index] == label and samples.read(index).tobytes() == picture.tobytes()
    splits = dataset.splits.values()
    assert len({samples.location for samples in splits}) == 3


def test_leaves_need_no_datasets_library():
    code = ("import sys; sys.modules['datasets'] = None\n"
            "from kd.data.sources import open_dataset; open_dataset('leaves')")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    code = code.replace("'leaves'", "'beans'")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert "pip install datasets" in result.stderr.splitlines()[-1]


# Folders of pictures

@pytest.mark.parametrize("validation", ["validation", "val", "valid", "dev"])
def test_image_folder(tmp_path, validation):
    splits = {validation if split == "validation" else split: classes for split, classes in FULL.items()}
    root = image_folder(tmp_path / "set", **splits)
    (root / "train" / "a" / ".hidden").write_text("x")
    (root / "train" / "a" / "Thumbs.db").write_text("x")
    (root / "labels.csv").write_text("x")
    dataset = open_quietly(root)
    assert (dataset.name, dataset.classes) == ("set", ("a", "b"))
    assert {split: samples.labels.tolist() for split, samples in dataset.splits.items()} == {
        "train": [0] * 6 + [1] * 4, "validation": [0, 1, 1], "test": [0, 0, 1]}
    train = dataset.splits["train"]
    assert train.labels.dtype == np.int64
    assert train.name_of(6) == str(root / "train" / "b" / "00.jpg")
    assert train.read(6) == (root / "train" / "b" / "00.jpg").read_bytes()


def test_files_of_any_name_and_depth_are_samples(tmp_path):
    root = image_folder(tmp_path, **FULL)
    (root / "train" / "a" / "deeper" / "still").mkdir(parents=True)
    (root / "train" / "a" / "deeper" / "still" / "x.txt").write_bytes(jpeg(9))
    assert len(open_quietly(root).splits["train"]) == 11


def test_fingerprint_changes_with_the_content_and_location_does_not(tmp_path):
    root = image_folder(tmp_path, **FULL)
    first, again = open_quietly(root).splits["train"], open_quietly(root).splits["train"]
    assert (first.fingerprint, first.location) == (again.fingerprint, again.location)
    path = root / "train" / "a" / "03.jpg"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    changed = open_quietly(root).splits["train"]
    assert changed.fingerprint != first.fingerprint and changed.location == first.location


def test_folders_that_cannot_be_used(tmp_path):
    refused(image_folder(tmp_path / "1", train={"a": 3}), "one class only .a.")
    refused(image_folder(tmp_path / "2", train={"a": 3, "b": 0}), "no images in .*2/train/b")
    refused(image_folder(tmp_path / "3", train={"a": 3, "b": 2}, test={"c": 1}), "test has 'c', which train lacks")
    refused(image_folder(tmp_path / "4", train={"a": 3, "b": 2}, val={"c": 1}), "validation has 'c'")
    refused(image_folder(tmp_path / "5", train={"a": 0, "b": 0}), "no images")
    refused(image_folder(tmp_path / "6", val={"a": 1}, test={"a": 1}), "no images; it needs train/CLASS/")
    refused(image_folder(tmp_path / "7", **FULL, val={"a": 1}), "both validation and val")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no images; it needs train/CLASS/")
    (tmp_path / "file.pkl").write_bytes(pickle.dumps("x"))
    refused(tmp_path / "file.pkl", "is a file; give the folder")
    refused(tmp_path / "emty", f"no such folder .did you mean {tmp_path / 'empty'}")


def test_links_may_not_leave_the_folder(tmp_path):
    outside = image_folder(tmp_path / "outside", **FULL)
    for number, (link, to) in enumerate({
            "train/a/link.jpg": outside / "train" / "a" / "00.jpg", "train/a/link": outside / "train" / "a",
            "train/c": outside / "train" / "a", "test": outside / "test", "train/b/x.jpg": Path("/etc/passwd"),
            "train/a/up.jpg": Path("../../../outside/train/a/01.jpg")}.items()):
        root = image_folder(tmp_path / str(number), train=FULL["train"])
        (root / link).symlink_to(to)
        refused(root, f"{link.replace('.', '[.]')}.* leads out of the dataset's folder")
    within = image_folder(tmp_path / "within", train=FULL["train"], test=FULL["test"])
    (within / "validation").symlink_to("test")
    (within / "train" / "a" / "link.jpg").symlink_to("00.jpg")
    assert len(open_quietly(within).splits["train"]) == 11


def test_odd_files_are_refused_by_name(tmp_path):
    root = image_folder(tmp_path, **FULL)
    os.mkfifo(root / "train" / "a" / "pipe.jpg")  # opening it would wait for ever
    refused(root, "pipe.jpg is neither a file nor a folder")
    (root / "train" / "a" / "pipe.jpg").unlink()
    (root / "train" / "a" / "circle").symlink_to("../..")
    refused(root, "circle is neither")


# Missing splits

def carved(root: Path, seed: int = 0) -> tuple[dict, list[str]]:
    said: list[str] = []
    return open_dataset(str(root), seed, said.append).splits, said


def test_missing_splits_are_carved_from_train_and_said(tmp_path):
    root = image_folder(tmp_path, train={"a": 40, "b": 20})
    splits, said = carved(root)
    names = {split: [samples.name_of(index) for index in range(len(samples))] for split, samples in splits.items()}
    assert sum(map(len, names.values())) == 60 == len(set().union(*names.values()))
    assert {split: sorted(Counter(samples.labels.tolist()).values()) for split, samples in splits.items()} == {
        "train": [16, 32], "validation": [2, 4], "test": [2, 4]}
    for samples in splits.values():
        for index in range(len(samples)):
            assert Path(samples.name_of(index)).parent.name == "ab"[samples.labels[index]]
            assert samples.read(index) == Path(samples.name_of(index)).read_bytes()
    assert len(said) == 2 and "no test split; 6 images carved from train" in said[0]
    assert "no validation split; 6 images" in said[1]


def test_carving_is_seeded(tmp_path):
    root = image_folder(tmp_path, train={"a": 40, "b": 20}, test={"a": 1, "b": 1})

    def held_out(seed):
        samples = carved(root, seed)[0]["validation"]
        return [samples.name_of(index) for index in range(len(samples))], samples.fingerprint, samples.location

    assert held_out(3) == held_out(3)
    assert all(first != second for first, second in zip(held_out(3), held_out(4)))
    assert len(carved(root)[1]) == 1 and len(carved(root)[0]["test"]) == 2


@settings(deadline=None, derandomize=True, max_examples=30)
@given(counts=st.lists(st.integers(3, 60), min_size=2, max_size=5), seed=st.integers(0, 2 ** 40))
def test_every_part_has_every_class(counts, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    train = Samples(labels, lambda index: bytes([index % 256]), lambda index: str(index), "p", "i")
    dataset = Dataset("x", tuple(map(str, range(len(counts)))), {"train": train})
    parts = with_three_splits(dataset, seed, lambda _: None).splits
    rows = [part.name_of(index) for part in parts.values() for index in range(len(part))]
    assert sorted(rows, key=int) == [str(row) for row in range(sum(counts))]
    for part in parts.values():
        assert set(part.labels.tolist()) == set(range(len(counts)))
        assert [labels[int(part.name_of(index))] for index in range(len(part))] == part.labels.tolist()


def test_too_few_images_to_carve(tmp_path):
    refused(image_folder(tmp_path, train={"a": 9, "b": 2}), "no validation split.*is alone in its class")


# The Hub's layout

def test_hub_layout(tmp_path):
    root = hub_folder(tmp_path / "toy", {"train": [0, 1, 1, 0], "validation": [1, 0], "test": [0]})
    dataset = open_quietly(root)
    assert (dataset.name, dataset.classes) == ("toy", ("a", "b"))
    assert {split: samples.labels.tolist() for split, samples in dataset.splits.items()} == {
        "train": [0, 1, 1, 0], "validation": [1, 0], "test": [0]}
    train = dataset.splits["train"]
    assert [train.read(index) for index in range(4)] == [jpeg(index) for index in range(4)]
    assert train.name_of(2) == f"{root} train row 2 (2.jpg)"


def test_hub_layout_notices_a_changed_file(tmp_path):
    root = hub_folder(tmp_path / "toy", {"train": [0, 1, 1, 0], "validation": [1, 0], "test": [0]})
    first = open_quietly(root).splits
    path = root / "data" / "train-00000.parquet"
    os.utime(path, (1, 1))
    second = open_quietly(root).splits
    assert first["train"].fingerprint != second["train"].fingerprint
    assert first["test"].fingerprint == second["test"].fingerprint


@pytest.mark.parametrize("feature, values, classes", [
    (datasets.Value("string"), ["rust", "healthy", "rust"], ("healthy", "rust")),
    (datasets.Value("int32"), [10, 9, 10], ("9", "10")),
])
def test_labels_of_text_and_whole_numbers_are_encoded_sorted(tmp_path, feature, values, classes):
    splits = {"train": values, "validation": values[:2], "test": values[1:]}
    dataset = open_quietly(hub_folder(tmp_path, splits, feature))
    assert dataset.classes == classes
    assert dataset.splits["train"].labels.tolist() == [1, 0, 1]
    assert dataset.splits["test"].labels.tolist() == [0, 1]


def test_text_label_that_train_lacks(tmp_path):
    refused(hub_folder(tmp_path, {"train": ["x", "y"], "test": ["x", "z"], "validation": ["x"]},
                       datasets.Value("string")), "test has 'z', which train lacks")


@pytest.mark.parametrize("unlabelled", [[-1, -1], [None, None]])
def test_split_without_labels_counts_as_missing(tmp_path, unlabelled):
    splits, said = carved(hub_folder(tmp_path, {"train": [0, 1] * 20, "validation": [1, 0], "test": unlabelled}))
    assert said[0].endswith("its test split has no labels; treated as missing") and "carved" in said[1]
    assert len(said) == 2 and len(splits["test"]) == 4 and len(splits["train"]) == 36


def test_tables_that_cannot_be_used(tmp_path):
    fine = {"validation": [0, 1], "test": [0, 1]}
    refused(hub_folder(tmp_path / "1", {"train": [0, 1, -1, 0]} | fine), r"train row 2 \(2.jpg\): label -1")
    refused(hub_folder(tmp_path / "2", {"train": [1, 1, 1]} | fine), "one class only .b.")
    refused(hub_folder(tmp_path / "3", {"train": [-1, -1]} | fine), "no labelled image")
    refused(hub_folder(tmp_path / "4", {"test": [0, 1]}), "no train split .found: test.")
    three = datasets.ClassLabel(names=["a", "b", "c"])
    refused(hub_folder(tmp_path / "5", {"train": [0, 1], "test": [2]} | {"validation": [0]}, three), "test has 'c'")
    columns = {"id": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    message = refused(hub_folder(tmp_path / "6", {"train": [0, 1]} | fine, features=datasets.Features(columns)),
                      "no column of type Image")
    assert "id (Value), label (ClassLabel)" in message
    columns = {"picture": datasets.Image(), "score": datasets.Value("float32")}
    message = refused(hub_folder(tmp_path / "7", {"train": [0, 1]} | fine, features=datasets.Features(columns)),
                      "which column is the label")
    assert "picture (Image), score (Value)" in message
    root = hub_folder(tmp_path / "8", {"train": [0, 1]} | fine)
    (root / "data" / "train-00000.parquet").write_bytes(b"PAR1 and no more")
    refused(root, f"--dataset {root} cannot be read: ")


def test_table_that_names_files_gets_none(tmp_path):
    """A path in place of bytes could name any file of the machine."""
    root = hub_folder(tmp_path / "toy", {"train": [0, 1], "validation": [0, 1], "test": [0, 1]})
    features = datasets.Features({"id": datasets.Value("string"),
                                  "picture": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                                  "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"id": ["0", "1"], "picture": [{"bytes": None, "path": "/etc/passwd"}, {"bytes": None, "path": None}],
            "label": [0, 1]}
    table = datasets.Dataset.from_dict(rows, features)
    table.cast_column("picture", datasets.Image(decode=False)).to_parquet(root / "data" / "train-00000.parquet")
    train = open_quietly(root).splits["train"]
    with pytest.raises(BadInput, match="/etc/passwd leads out of the dataset's folder"):
        train.read(0)
    with pytest.raises(BadInput, match="train row 1 has no image"):
        train.read(1)


@pytest.mark.parametrize("path", ["../secret/*.parquet", "/etc/*.parquet", "https://example.org/x.parquet",
                                  "hf://datasets/a/b/x.parquet", "zip://x.parquet::https://example.org/x.zip"])
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_card_may_not_lead_out_of_the_folder(tmp_path, path, card):
    root = hub_folder(tmp_path / "toy", {"train": [0, 1]})
    hub_folder(tmp_path / "secret", {"train": [0, 1]})
    text = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ['{path}']\n"
    (root / card).write_text(f"---\n{text}---\n" if card == "README.md" else text)
    assert path in refused(root, f"toy/{card}.* leads out of the dataset's folder")


def test_linked_parquet_may_not_lead_out_of_the_folder(tmp_path):
    root = hub_folder(tmp_path / "toy", {"train": [0, 1], "test": [0, 1]})
    (root / "data" / "test-00000.parquet").rename(tmp_path / "outside.parquet")
    (root / "data" / "test-00000.parquet").symlink_to(tmp_path / "outside.parquet")
    refused(root, "test-00000.parquet leads out of the dataset's folder")


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
    assert Image.open(io.BytesIO(dataset.splits["test"].read(127))).size == (500, 500)


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


def open_in_process(names: list[str], home: Path, endpoint: str) -> list[Any]:
    """open_dataset in a process of its own, because the Hub's client reads its settings when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
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
    offline = open_in_process(["someone/toy", "beans"], folder / "home", "http://127.0.0.1:9")
    return dict(zip(("online", "unknown", "offline", "unreachable"), online + offline, strict=True))


def test_hub_that_cannot_be_reached(hub_answers):
    message = hub_answers["unreachable"]
    assert isinstance(message, str) and "the Hub cannot be reached" in message
    assert "`python train.py --dataset leaves`" in message


def test_hub_dataset_by_its_id_and_then_offline_from_the_cache(hub_answers):
    online, offline = hub_answers["online"], hub_answers["offline"]
    assert online[:3] == ["someone/toy", ["a", "b"], {"train": [0, 1] * 9, "validation": [0, 1], "test": [1, 0]}]
    assert online[4:] == [jpeg(1).hex(), []]
    assert offline[:5] == online[:5]  # with the same fingerprint, so that its decoded pictures are dataset again
    assert offline[5] == ["someone/toy: the Hub cannot be reached; using the copy in its cache"]


def test_hub_id_that_does_not_exist(hub_answers):
    message = hub_answers["unknown"]
    assert "neither a folder here nor a dataset on the Hub" in message
    assert "did you mean AI-Lab-Makerere/beans?" in message
