"""What a saved model sees in pictures:

    python -m kd predict runs/demo/student IMAGE|FOLDER ... [--top 3] [--json]

The pictures go the way of validation and test: the same decoder, resize, centre crop, normalisation and precision.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd import BadInput, models
from kd.data.decoding import open_picture, to_frame
from kd.machine import runtime as machine
from kd.predict import predict
from kd.scores import softmax
from kd.tools import arguments

# endings of the files that are taken from a folder; a file that is named itself may have any
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class PictureFiles:
    """Image files as resized frames, decoded when they are read."""

    def __init__(self, paths: list[Path], size: int, prep: models.Preprocessing) -> None:
        self.paths, self.size, self.interpolation = paths, size, prep.interpolation
        self.side = math.floor(size / prep.crop_pct)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """uint8 `(B, R, R, 3)`. Raises BadInput, naming the file, where one is not an image."""
        return np.stack([self._frame(self.paths[number]) for number in numbers])

    def _frame(self, path: Path) -> np.ndarray:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}; give an image that can be read") from error
        return to_frame(open_picture(content, str(path)), self.size, self.side, self.interpolation)


def find_pictures(paths: list[str]) -> list[Path]:
    """Files as given, and every image below a folder, sorted. Raises BadInput for a path that is neither."""
    pictures: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            images = sorted(file for file in path.rglob("*")
                            if file.suffix.lower() in SUFFIXES and file.is_file())
            if not images:
                raise BadInput(f"{path}: holds no image; give a file, or a folder with images")
            pictures += images
        elif path.is_file():
            pictures.append(path)
        else:
            raise BadInput(f"{path}: no such file or folder; give an image or a folder of images")
    return pictures


def main(argv: list[str]) -> list[dict[str, Any]]:
    """Prints, and returns, one row a picture. Raises BadInput."""
    parser = arguments.make_parser("predict", __doc__)
    parser.add_argument("model", help="folder that train.py saved, such as runs/demo/student")
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER")
    parser.add_argument("--top", type=int, default=3, help="how many classes to name (default: 3)")
    arguments.add_json_flag(parser, "one JSON object a picture")
    arguments.add_device_flags(parser)
    args = parser.parse_args(argv)
    if args.top < 1:
        raise BadInput(f"--top {args.top}: must be at least 1")

    runtime = machine.start(args.device, args.amp, "off")
    model, prep, size, classes = models.open_saved(args.model)
    paths = find_pictures(args.images)
    # the memory format is that of train.py, because another one rounds differently
    model = model.to(runtime.device).to(memory_format=torch.channels_last)
    logits = predict(model, PictureFiles(paths, size, prep), prep, size, runtime, "predicting")

    rows = []
    width = max(len(str(path)) for path in paths)
    for path, probabilities in zip(paths, softmax(logits), strict=True):
        best = np.argsort(-probabilities, kind="stable")[:args.top]
        row = {"file": str(path),
               "top": [{"class": classes[i], "probability": float(probabilities[i])} for i in best]}
        rows.append(row)
        if args.json:
            print(json.dumps(row))
        else:
            print(f"{str(path):{width}}  " + "  ".join(f"{classes[i]} {100 * probabilities[i]:.1f} %" for i in best))
    return rows
