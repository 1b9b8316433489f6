"""kd/pretrained.py: weights from files, folders and repositories, and the classes that come with them."""

import argparse
import json
import os
import pickle
import threading
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from torch import nn

from kd import BadInput, models
from kd.machine import runtime
from tests.helpers import standin_hub

CLASSES = ("ant", "bee", "cat", "dog")
MACHINE = runtime.start("cpu", "off", "off", "off")


def make(name: str = "test_resnet", classes: tuple[str, ...] = CLASSES, weights: str | Path = "none",
         size: int | None = None, said: list[str] | None = None) -> nn.Module:
    lines = [] if said is None else said
    return models.create("teacher", name, classes, str(weights), size, lines.append).eval()


def save(model: nn.Module, folder: Path, classes: tuple[str, ...] = CLASSES, size: int = 32) -> Path:
    models.save(models.Classifier(model, models.preprocessing(model), size, classes, MACHINE), folder, "a card")
    return folder


def logits(model: nn.Module, size: int = 32) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))


def random_head(model: nn.Module, other: nn.Module) -> bool:
    """Whether `model` has all weights of `other` but those of its head, which is another one."""
    mine, theirs = model.state_dict(), other.state_dict()
    differ = {key for key in mine if mine[key].shape != theirs[key].shape or not torch.equal(mine[key], theirs[key])}
    return differ == {"fc.weight", "fc.bias"}


# Files

def test_every_file_that_timm_writes_gives_the_weights_that_were_saved(tmp_path):
    model = make()
    state = model.state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    zeros = {key: torch.zeros_like(value) for key, value in state.items()}
    files = {"a.pth": state, "b.pt": {"state_dict": wrapped, "epoch": 3, "args": argparse.Namespace(lr=1.0)},
             "c.bin": {"model": state}, "d.pth.tar": {"state_dict": zeros, "state_dict_ema": state},
             "e.pth": {f"_orig_mod.{key}": value for key, value in state.items()},
             "f.pth": {"model": zeros, "model_ema": wrapped}}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        assert models.digest(make(weights=tmp_path / name)) == models.digest(model), name
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert models.digest(make(weights=tmp_path / "old.pth")) == models.digest(model)
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    loaded = make(weights=tmp_path / "half.safetensors").state_dict()
    assert all(torch.equal(loaded[key], half[key].to(state[key].dtype)) for key in state)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def test_a_file_that_needs_code_or_holds_no_weights_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = make().state_dict()
    torch.save({**state, "x": RunsCode()}, "code.pth")
    torch.save({**state, "x": RunsCode()}, "old-code.pth", _use_new_zipfile_serialization=False)
    torch.save(make(), "whole-model.pth")
    Path("raw.pkl").write_bytes(pickle.dumps(RunsCode()))
    Path("text.pth").write_text("this is no pickle")
    Path("empty.bin").touch()
    torch.save(state, "good.pth")
    Path("cut.pth").write_bytes(Path("good.pth").read_bytes()[:5000])
    torch.save([1, 2], "list.pth")
    torch.save({"epoch": 3}, "no-tensors.pth")
    torch.save({**state, "fc.bias": state["fc.bias"] / 0}, "inf.pth")
    torch.save({key: value for key, value in state.items() if key != "bn1.weight"}, "part.pth")
    expected = {"code.pth": "would run code", "old-code.pth": "would run code", "whole-model.pth": "would run code",
                "raw.pkl": "not a readable weights file", "text.pth": "not a readable", "empty.bin": "not a readable",
                "cut.pth": "not a readable", "list.pth": "not a readable", "no-tensors.pth": "holds no weights",
                "inf.pth": "fc.bias holds NaN or infinite",
                "part.pth": "another model than test_resnet: bn1.weight is missing .1 such"}
    for name, text in expected.items():
        with pytest.raises(BadInput, match=f"^{name}: .*{text}") as caught:
            make(weights=name)
        assert "\n" not in str(caught.value)
    assert not Path("it-ran").exists()


def test_a_swin_file_of_an_older_timm_loads_with_its_values(tmp_path):
    name, size = "swin_tiny_patch4_window7_224", 64
    model = make(name, size=size)
    state = dict(model.state_dict())
    for key in [key for key in state if key.endswith("relative_position_bias_table")]:
        table = state[key]
        side = round((len(table) ** .5 + 1) / 2) ** 2
        state[key.replace("bias_table", "index")] = torch.zeros(side, side, dtype=torch.long)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    torch.save({"model": state}, tmp_path / "swin.pth")
    loaded = make(name, weights=tmp_path / "swin.pth", size=size)
    assert torch.equal(logits(loaded, size), logits(model, size))
    assert models.digest(loaded) == models.digest(model)


def test_a_file_in_the_layout_of_the_models_authors_loads_with_its_values(tmp_path):
    model = make("convnext_atto")
    names = {"stem.0": "downsample_layers.0.0", "stem.1": "downsample_layers.0.1", "head.fc": "head",
             "head.norm": "norm"}
    authors = {}
    for key, value in model.state_dict().items():
        prefix = next((prefix for prefix in names if key.startswith(prefix + ".")), None)
        if prefix:
            key = names[prefix] + key[len(prefix):]
        elif ".downsample." in key:
            stage, number, leaf = key.split(".")[1], key.split(".")[3], key.split(".")[4]
            key = f"downsample_layers.{stage}.{number}.{leaf}"
        else:
            key = key.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        authors[key] = value
    torch.save({"model": authors}, tmp_path / "convnext.pth")
    # timm's own way to the same weights
    theirs = timm.create_model("convnext_atto", pretrained=True, num_classes=4, pretrained_cfg_overlay={
        "file": str(tmp_path / "convnext.pth"), "num_classes": 4})
    assert models.digest(theirs) == models.digest(model)
    assert models.digest(make("convnext_atto", weights=tmp_path / "convnext.pth")) == models.digest(model)
    # and with a head of other classes: all but the head
    other = make("convnext_atto", ("a", "b"), tmp_path / "convnext.pth")
    assert torch.equal(other.state_dict()["stem.0.weight"], model.state_dict()["stem.0.weight"])


def test_a_file_of_another_model_is_refused(tmp_path):
    torch.save(make("test_efficientnet").state_dict(), tmp_path / "x.pth")
    for name in ("swin_tiny_patch4_window7_224", "convnext_atto", "test_vit"):
        with pytest.raises(BadInput, match=rf"x.pth: holds another model than {name}: .* is missing \(\d+ such"):
            make(name, weights=tmp_path / "x.pth")


# Classes that come with the weights

def test_a_head_in_another_order_is_put_into_the_datas_order(tmp_path):
    torch.manual_seed(0)
    model = make(classes=("a", "b", "c", "d"))
    folder = save(model, tmp_path / "teacher", ("a", "b", "c", "d"))
    for weights in (folder, folder / "model.safetensors"):      # this file stands for its folder
        said: list[str] = []
        loaded = make(classes=("a", "c", "b", "d"), weights=weights, said=said)
        assert torch.equal(logits(loaded), logits(model)[:, [0, 2, 1, 3]])
        assert said == ["teacher: its 4 classes are the data's in another order; its head was reordered"]
    said = []
    loaded = make(classes=("d", "a", "b", "c"), weights=folder, said=said)      # not its own inverse
    assert torch.equal(logits(loaded), logits(model)[:, [3, 0, 1, 2]]) and len(said) == 1
    said = []
    assert models.digest(make(classes=("a", "b", "c", "d"), weights=folder, said=said)) == models.digest(model)
    assert said == []
    # a file by another name says nothing about classes, and is taken as it is
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert models.digest(make(classes=("a", "c", "b", "d"), weights=folder / "weights.safetensors", said=said)
                         ) == models.digest(model)
    assert said == []


@pytest.mark.parametrize("name, size", [
    ("deit_tiny_distilled_patch16_224", 32), ("dla46_c", 32), ("convnext_atto", 32), ("test_efficientnet", 32)])
def test_every_head_of_a_model_is_reordered(tmp_path, name, size):
    torch.manual_seed(0)
    model = make(name, size=size)
    for parameter in model.parameters():    # zeros and ones would hide an order
        if parameter.ndim < 2:
            nn.init.normal_(parameter, 1, .1)
    folder = save(model, tmp_path / "teacher", CLASSES, size)
    said: list[str] = []
    loaded = make(name, ("dog", "ant", "bee", "cat"), folder, size, said)
    expected = logits(model, size)[:, [3, 0, 1, 2]]
    assert torch.equal(logits(loaded, size), expected) and not torch.equal(expected, expected[:, [3, 0, 1, 2]])
    assert len(said) == 1 and "reordered" in said[0]


def test_a_head_of_other_classes_is_replaced(tmp_path):
    model = make()
    folder = save(model, tmp_path / "teacher")
    said: list[str] = []
    torch.manual_seed(1)
    loaded = make(classes=("ant", "bee", "cat", "elk"), weights=folder, said=said)
    assert said == ["teacher: the head of 4 classes for other classes (dog, …) was replaced by a random one of 4"]
    torch.manual_seed(1)
    assert random_head(loaded, model)
    assert torch.equal(loaded.state_dict()["fc.weight"], make().state_dict()["fc.weight"])     # random, from the seed
    said = []
    make(classes=tuple("pqrstu"), weights=folder, said=said)
    assert said == ["teacher: the head of 4 classes for other classes (ant, bee, cat, …) was replaced by a random one "
                    "of 6"]
    # a subset of the classes is another head too
    assert random_head(make(classes=("ant", "bee"), weights=folder), model)


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = value
        if value is None:
            del config[key]
    (folder / "config.json").write_text(json.dumps(config))


def test_names_are_compared_in_nfc_and_may_be_written_in_every_way_that_timm_knows(tmp_path):
    model = make()
    classes = ("café", "crème", "pâté", "thé")
    folder = save(model, tmp_path / "teacher", tuple(unicodedata.normalize("NFD", one) for one in classes))
    turned = ("crème", "café", "pâté", "thé")
    expected = logits(model)[:, [1, 0, 2, 3]]
    said: list[str] = []
    assert models.digest(make(classes=classes, weights=folder, said=said)) == models.digest(model) and said == []
    assert torch.equal(logits(make(classes=turned, weights=folder)), expected)
    rewrite(folder, label_names={str(row): label for row, label in enumerate(classes)})
    assert torch.equal(logits(make(classes=turned, weights=folder)), expected)
    declared = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    rewrite(folder, label_names=None, pretrained_cfg={**declared, "label_names": list(classes)})
    assert torch.equal(logits(make(classes=turned, weights=folder)), expected)
    # what does not name each row once is another head
    for names in ({"0": "café", "2": "crème", "3": "pâté", "9": "thé"}, {"x": "café"}, [*classes, "eau"], ["café"] * 4):
        rewrite(folder, label_names=names)
        said = []
        assert random_head(make(classes=classes, weights=folder, said=said), model)
        assert "was replaced by a random one" in said[0]


def test_a_config_that_is_not_timms_says_nothing_and_a_broken_one_is_refused(tmp_path):
    folder = save(make(), tmp_path / "teacher")
    (folder / "config.json").write_text('{"architectures": ["ResNetForImageClassification"]}')
    said: list[str] = []
    make(classes=tuple("pqrs"), weights=folder, said=said)
    assert said == []
    for text in ("{", "[]", '"x"'):
        (folder / "config.json").write_text(text)
        with pytest.raises(BadInput, match="config.json: not readable"):
            make(weights=folder)


def test_a_folder_of_timm_with_a_pickle_is_read_too(tmp_path):
    model: Any = make()
    timm.models.save_for_hf(model, str(tmp_path / "timm"), {"label_names": list(CLASSES)})
    assert (tmp_path / "timm" / "pytorch_model.bin").exists()
    turned = make(classes=("bee", "ant", "cat", "dog"), weights=tmp_path / "timm")
    assert torch.equal(logits(turned), logits(model)[:, [1, 0, 2, 3]])


def test_the_preprocessing_and_the_architecture_of_the_weights_are_not_ignored(tmp_path):
    model = make()
    prep = models.Preprocessing((.5, .5, .5), (.25, .25, .25), "bilinear", .9)
    models.save(models.Classifier(model, prep, 32, CLASSES, MACHINE), tmp_path / "teacher", "a card")
    said: list[str] = []
    loaded = make(weights=tmp_path / "teacher", said=said)
    assert models.preprocessing(loaded)[:3] == prep[:3]
    assert said == ["teacher: declares another mean, std or interpolation than test_resnet; its own are used"]
    save(make("efficientnet_b0"), tmp_path / "b0")
    said = []
    make("tf_efficientnet_b0", weights=tmp_path / "b0", said=said)      # the same keys, padded otherwise
    assert "b0: these are weights of efficientnet_b0, here in tf_efficientnet_b0" in said


# Models by the name of a folder or a repository

def test_a_folder_gives_the_architecture_its_arguments_the_weights_and_the_classes(tmp_path):
    theirs: Any = timm.create_model("test_resnet", num_classes=4, act_layer="gelu").eval()
    timm.models.save_for_hf(theirs, str(tmp_path / "m"), {"label_names": list(CLASSES)}, safe_serialization=True)
    name = f"local-dir:{tmp_path / 'm'}"
    models.check("teacher", name, "imagenet")
    (tmp_path / "no weights").mkdir()
    (tmp_path / "no weights" / "config.json").write_text((tmp_path / "m" / "config.json").read_text())
    models.check("teacher", f"local-dir:{tmp_path / 'no weights'}")
    with pytest.raises(BadInput, match="no such file"):
        models.check("teacher", f"local-dir:{tmp_path / 'no weights'}", "imagenet")
    loaded = make(name, weights="imagenet")
    assert models.architecture(loaded) == "test_resnet"
    assert torch.equal(logits(loaded), logits(theirs)) and not torch.equal(logits(loaded), logits(plain(theirs)))
    turned = make(name, ("dog", "ant", "bee", "cat"), "imagenet")
    assert torch.equal(logits(turned), logits(theirs)[:, [3, 0, 1, 2]])

    # without its weights: the architecture, with random weights from the seed
    torch.manual_seed(0)
    fresh = make(name, ("a", "b"))
    torch.manual_seed(0)
    assert models.digest(fresh) == models.digest(make(classes=("a", "b")))
    # what is saved of it keeps the arguments
    folder = save(fresh, tmp_path / "student", ("a", "b"))
    again = models.open_saved(str(folder), MACHINE).model
    assert torch.allclose(logits(again), logits(fresh), atol=1e-6)      # in another memory format
    assert torch.equal(logits(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()), logits(fresh))
    assert not torch.equal(logits(again), logits(plain(fresh)))


def plain(model: nn.Module) -> nn.Module:
    """The same weights in an architecture without arguments."""
    other = timm.create_model("test_resnet", num_classes=model.num_classes).eval()  # type: ignore[arg-type]
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """The Hub's client on a stand-in, whose repositories are a dict from name to files."""
    server = standin_hub.serve(tmp_path, "someone/data")
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    address = standin_hub.address_of(server)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    yield server.models
    server.shutdown()
    server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_repository_is_a_model_with_its_weights_and_classes(tmp_path, repositories):
    model = make()
    repositories["someone/insects"] = files_of(save(model, tmp_path / "m"))
    name = "hf-hub:someone/insects"
    models.check("teacher", name, "imagenet")
    assert models.digest(make(name, weights="imagenet")) == models.digest(model)
    said: list[str] = []
    turned = make(name, ("bee", "ant", "cat", "dog"), "imagenet", said=said)
    assert torch.equal(logits(turned), logits(model)[:, [1, 0, 2, 3]])
    assert said == ["someone/insects: its 4 classes are the data's in another order; its head was reordered"]
    assert random_head(make(name, ("p", "q"), "imagenet"), model)
    assert models.architecture(make(name, ("p", "q"))) == "test_resnet"

    repositories["someone/transformers"] = {"config.json": b'{"architectures": ["X"]}'}
    repositories["someone/novel"] = {"config.json": b'{"architecture": "resnet5O", "pretrained_cfg": {}}'}
    for repository, text in (("someone/transformers", "has no 'architecture', so timm did not write it"),
                             ("someone/novel", "Unknown model"), ("someone/absent", "404")):
        for weights in ("none", "imagenet"):
            with pytest.raises(BadInput, match=f"^--teacher.*{text}") as caught:
                make(f"hf-hub:{repository}", weights=weights)
            assert "\n" not in str(caught.value)


def test_timms_pretrained_weights_are_resampled_to_another_size(tmp_path, repositories):
    theirs = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k").eval()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    repositories["timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"] = files_of(tmp_path)
    classes = tuple(f"class {i}" for i in range(1000))
    for name in ("vit_tiny_patch16_224", "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"):
        assert torch.equal(logits(make(name, classes, "imagenet", 224), 224), logits(theirs, 224))
        small = make(name, classes, "imagenet", 96)
        resampled = timm.create_model("vit_tiny_patch16_224", pretrained=True, img_size=96).eval()
        assert torch.equal(logits(small, 96), logits(resampled, 96))


def test_a_hub_that_cannot_be_reached_is_one_line(unreachable_hub):
    for weights in ("none", "imagenet"):
        with pytest.raises(BadInput, match="^--teacher.*the Hub cannot be reached, and its cache does not") as caught:
            make("hf-hub:someone/insects", weights=weights)
        assert "\n" not in str(caught.value)
