"""What a saved model sees in pictures:

    python -m kd predict runs/demo/student IMAGE|FOLDER ... [--top 3] [--json]

The pictures go the way of validation and test: the same decoder, resize, centre crop, normalisation and precision.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from kd import BadInput, cli, models
from kd.data.decoding import open_picture, to_frame
from kd.machine import runtime
from kd.predict import predict

FORMATS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}  # looked for in folders


def softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise probabilities, float64."""
    shares = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def pictures(paths: list[str]) -> list[Path]:
    """Files as given, and every image below a folder, sorted. Raises BadInput for a path that is neither."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(one for one in path.rglob("*") if one.suffix.lower() in FORMATS and one.is_file())
            if not inside:
                raise BadInput(f"{path}: holds no image; give a file, or a folder with images")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise BadInput(f"{path}: no such file or folder; give an image or a folder of images")
    return found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give an image that can be read") from error


def main(argv: list[str]) -> list[dict]:
    """Prints, and returns, one row a picture. Raises BadInput."""
    parser = cli.OneLineParser(prog="python -m kd predict", description=__doc__, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that train.py saved, such as runs/demo/student")
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER")
    parser.add_argument("--top", type=int, default=3, help="how many classes to name (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object a picture")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="default: auto, as in "
                        "training; another precision may move a picture near the border")
    args = parser.parse_args(argv)
    if args.top < 1:
        raise BadInput(f"--top {args.top}: must be at least 1")
    run = runtime.start(args.device, args.amp, "off")
    model, prep, size, classes = models.open_saved(args.model)
    files = pictures(args.images)
    side = math.floor(size / prep.crop_pct)

    def read(numbers: np.ndarray) -> np.ndarray:
        return np.stack([to_frame(open_picture(_bytes(files[i]), str(files[i])), size, side, prep.interpolation)
                         for i in numbers])

    placed = model.to(run.device).to(memory_format=torch.channels_last)  # as train.py has it
    logits = predict(placed, read, len(files), prep, size, run, "predicting")
    rows = []
    width = max(len(str(path)) for path in files)
    for path, shares in zip(files, softmax(logits), strict=True):
        best = np.argsort(-shares, kind="stable")[:args.top]
        row = {"file": str(path), "top": [{"class": classes[i], "probability": float(shares[i])} for i in best]}
        told = "  ".join(f"{classes[i]} {100 * shares[i]:.1f} %" for i in best)
        print(json.dumps(row) if args.json else f"{str(path):{width}}  {told}")
        rows.append(row)
    return rows
