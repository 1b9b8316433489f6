"""What the tests of data sources share: small data sets on disk, and the three ways in which opening one can end."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kd import BadInput
from kd.data.table import Table, open_dataset

FULL = {"train": {"a": 6, "b": 4}, "validation": {"a": 1, "b": 2}, "test": {"a": 2, "b": 1}}


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


def hub_folder(root: Path, splits: dict[str, list], labels: Any = None, features: Any = None,
               image: str = "picture") -> Path:
    """Parquet files with a column `picture`, and `label` as given; the card is the one that the Hub would show."""
    import datasets
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


class Part:
    """The rows of one split, counted from 0."""

    def __init__(self, table: Table, split: str) -> None:
        self.table, self.rows, self.labels = table, table.splits[split], table.labels[table.splits[split]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getattr__(self, name: str) -> Any:
        """read, name_of and key_of, of a row of the split."""
        return lambda number: getattr(self.table, name)(int(self.rows[number]))


def parts(table: Table) -> dict[str, Part]:
    return {split: Part(table, split) for split in table.splits}


def open_and_listen(name: Any, **reading: str) -> tuple[Table, list[str]]:
    """The table, and what was said but for the closing line, which says what was read."""
    said: list[str] = []
    table = open_dataset(str(name), say=said.append, **reading)
    assert said.pop().startswith(f"{table.name}: {table.source}; classes ")
    return table, said


def open_quietly(name: Any, **reading: str) -> Table:
    table, said = open_and_listen(name, **reading)
    assert said == []
    return table


def refused(name: Any, match: str, **reading: str) -> str:
    with pytest.raises(BadInput, match=match) as caught:
        open_dataset(str(name), say=lambda _: None, **reading)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def labels(table: Table) -> dict[str, list[int]]:
    """The labels by split."""
    return {split: table.labels[rows].tolist() for split, rows in table.splits.items()}
