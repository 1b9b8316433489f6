"""A tiny data set on disk and a tiny configuration that trains on it in seconds."""

import os
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

import train

CLASSES = ("blob", "plain", "stripes")


def draw(kind: str, generator: np.random.Generator, side: int = 40) -> Image.Image:
    """A noisy picture of one of three kinds, any colour."""
    y, x = np.mgrid[:side, :side]
    colour = generator.integers(60, 200, 3)
    shape = {"stripes": (x + generator.integers(8)) // 4 % 2, "plain": np.zeros((side, side)),
             "blob": (x - generator.integers(12, 28)) ** 2 + (y - generator.integers(12, 28)) ** 2 < 70}[kind]
    pixels = colour + shape[..., None] * generator.choice([-50, 50]) + generator.normal(0, 6, (side, side, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make_photos(root: Path) -> Path:
    """An image folder: 42 + 12 + 12 pictures of 40 × 40 in three classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 14), ("validation", 4), ("test", 4)):
        for kind in CLASSES:
            folder = root / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                draw(kind, generator).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos"))


def tiny_config(photos: Path, folder: Path) -> train.Config:
    """A run of a few seconds in `folder`; `dataclasses.replace` changes what a test is about."""
    return train.Config(recipe="tutorial", dataset=str(photos), size=32, epochs=2, batch_size=8, lr=2e-3,
                        teacher="test_resnet", teacher_weights="none", teacher_epochs=1, teacher_lr=2e-3,
                        allow_weak_teacher=True, student="test_efficientnet", out=str(folder / "run"),
                        cache_dir=str(folder / "cache"), device="cpu", amp="off")


@pytest.fixture
def page_not_drawn(monkeypatch) -> None:
    """Drawing the page takes as long as a tiny run. What it is drawn from is written all the same."""
    monkeypatch.setattr("kd.tools.page.redraw", lambda out: out / "report.html", raising=False)


@pytest.fixture
def tiny(photos, tmp_path, page_not_drawn) -> train.Config:
    """A run in this process, without the drawing of its page. A process of its own draws it."""
    return tiny_config(photos, tmp_path)


@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory) -> tuple[train.Config, dict]:
    """A finished run and its result, which tests only read."""
    config = tiny_config(photos, tmp_path_factory.mktemp("trained"))
    return config, train.main(config)


@pytest.fixture
def unreachable_hub(tmp_path, monkeypatch) -> None:
    """A Hub that refuses at once, and an empty cache."""
    # The client reads its settings when it is imported, so they are set there.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session")
def beans() -> str:
    """The real photographs: the folder that KD_BEANS names."""
    if "KD_BEANS" not in os.environ:
        pytest.skip("KD_BEANS does not name the folder of the beans photographs")
    return os.environ["KD_BEANS"]
