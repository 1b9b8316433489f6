"""A saved model as one file that runs without this code, checked against PyTorch on real pictures:

    python -m kd export runs/demo/student --to onnx [--dataset leaves] [--int8] [--split test] [--out FILE] [--json]

onnx, torch-export (.pt2): a graph from `pixels`, uint8 RGB `(B, 3, size, size)` of any B, to `logits`, float32
`(B, C)`. Normalisation is inside, so nobody can get mean and std wrong; what is left to the caller is to resize and
crop, as the file's metadata says (`about`: labels, size, resize, interpolation).
safetensors: the weights alone, under timm's names, with the same metadata and with mean and std, which the caller then
has to apply.
--int8 (onnx): static quantisation, QDQ, one scale a channel of the weights, calibrated on pictures of train.

Everything is computed on the CPU in float32. What is written has passed the check: a float export whose logits differ
from PyTorch's is refused.
"""

import argparse
import json
import logging
import math
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kd import BadInput, TrainingFault, cli, models
from kd.machine import console, runtime
from kd.tools.evaluate import add_flags, dataset_of, open_both
from kd.data.frames import Split, center_crop

SUFFIX = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
BATCH = 32
# Pictures of train. On three trained MobileNetV2, 64 changed an answer or two of 128, and 1000 none; with 256, neither
# entropy nor percentiles were better than the plain minimum and maximum, and one scale a tensor was worse by 1 to 2.
CALIBRATION = 256
ROUNDS = 50        # of one picture each, by turns
TOLERANCE = 1e-4   # of the largest logit, at least of 1: float32 sums in another order

Logits = Callable[[np.ndarray], np.ndarray]  # uint8 (B, 3, size, size) to float32 (B, C)


class FromPixels(nn.Module):
    """uint8 `(B, 3, size, size)` to float32 logits `(B, C)`: the model with its normalisation inside."""

    def __init__(self, model: nn.Module, prep: models.Preprocessing) -> None:
        super().__init__()
        self.model, self.prep = model, prep

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(models.normalize(pixels, self.prep))


def pixels_of(split: Split, samples: np.ndarray, size: int) -> np.ndarray:
    """uint8 `(B, 3, size, size)`, contiguous: what the exported graph is fed."""
    return np.ascontiguousarray(center_crop(split.frames.read(samples), size).transpose(0, 3, 1, 2))


def write_torch_export(module: nn.Module, size: int, about: dict[str, str], file: Path) -> Logits:
    """Write `file` and return what it computes when it is read back."""
    program = torch.export.export(module, (_example(size),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file, extra_files={"about.json": json.dumps(about)})
    return _by_torch(torch.export.load(file).module())


def write_safetensors(model: nn.Module, prep: models.Preprocessing, classes: tuple[str, ...], about: dict[str, str],
                      file: Path) -> Logits:
    """Write `file` and return what a new model with its weights computes."""
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, file, metadata={"format": "pt", **about})
    read = models.create("model", about["architecture"], classes, str(file), say=lambda line: None)
    return _by_torch(FromPixels(read.eval(), prep))


def write_onnx(module: nn.Module, size: int, about: dict[str, str], file: Path) -> Logits:
    """Write `file` and return what onnxruntime computes with it."""
    import onnx
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside of torch's exporter
        program = torch.onnx.export(module, (_example(size),), dynamo=True, verbose=False, input_names=["pixels"],
                                    output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, about)
    onnx.save(proto, file)
    return by_onnxruntime(file)


def quantize(file: Path, split: Split, size: int, out: Path) -> Logits:
    """Write the int8 twin of the ONNX graph in `file` to `out`, calibrated on pictures of `split`."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process
    chosen = np.linspace(0, len(split) - 1, min(CALIBRATION, len(split))).astype(int)  # every class, where sorted

    class Pictures(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = list(chosen)

        def get_next(self) -> dict[str, np.ndarray] | None:
            if not self.left:
                return None
            bar.update(1)
            return {"pixels": pixels_of(split, np.array([self.left.pop(0)]), size)}

    ready = file.with_name("ready.onnx")
    quant_pre_process(str(file), str(ready), skip_symbolic_shape=True)  # the shapes of all that is quantised
    with console.progress(len(chosen), "calibrating") as bar:
        quantization.quantize_static(str(ready), str(out), Pictures(), quant_format=quantization.QuantFormat.QDQ,
                                     per_channel=True, activation_type=quantization.QuantType.QUInt8,
                                     weight_type=quantization.QuantType.QInt8,
                                     calibrate_method=quantization.CalibrationMethod.MinMax)
    proto = onnx.load(out)
    onnx.helper.set_model_props(proto, {one.key: one.value for one in onnx.load(file).metadata_props})
    onnx.save(proto, out)
    return by_onnxruntime(out)


def by_onnxruntime(file: Path) -> Logits:
    """The logits of an ONNX file on the CPU, with as many threads as torch has."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # a thread that waits in a loop for the next picture would take its core from PyTorch, timed by turns with it
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(["logits"], {"pixels": pixels})[0]


def _by_torch(module: nn.Module) -> Logits:
    def logits(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(pixels)).numpy()
    return logits


def _example(size: int) -> Tensor:
    return torch.zeros(2, 3, size, size, dtype=torch.uint8)  # two, because a batch of one would be taken for fixed


def need_onnx() -> None:
    """Raise BadInput where an extra that ONNX takes is missing."""
    try:
        import onnx
        import onnxruntime
        import onnxscript
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        del onnx, onnxruntime, onnxscript
    except ImportError as error:
        raise BadInput(f"--to onnx: {error.name} is not installed: pip install onnx onnxruntime onnxscript") from error


def compare(known: Logits, exported: Logits, split: Split, size: int) -> dict[str, Any]:
    """The two on every picture of `split`: largest difference of logits, equal answers, right answers of each."""
    difference, largest, agree, right = 0.0, 1.0, 0, np.zeros(2, int)
    with console.progress(len(split), "checking") as bar:
        for start in range(0, len(split), BATCH):
            samples = np.arange(start, min(start + BATCH, len(split)))
            pixels = pixels_of(split, samples, size)
            one, other = known(pixels), exported(pixels)
            # np.maximum hands a NaN on, which max would lose
            difference = float(np.maximum(difference, np.abs(one - other).max()))
            largest = max(largest, float(np.abs(one).max()))
            answers = one.argmax(1), other.argmax(1)
            agree += int((answers[0] == answers[1]).sum())
            right += [int((answer == split.labels[samples]).sum()) for answer in answers]
            bar.update(len(samples))
    return {"total": len(split), "agree": agree, "max_difference": difference, "largest_logit": largest,
            "correct": int(right[1]), "pytorch_correct": int(right[0])}


def latency(one: Logits, other: Logits, split: Split, size: int) -> tuple[float, float]:
    """Median milliseconds of one picture for each, by turns, warmed up."""
    pictures = [pixels_of(split, np.array([i % len(split)]), size) for i in range(ROUNDS)]
    seconds = np.zeros((2, ROUNDS + 5))
    with console.progress(ROUNDS + 5, "timing") as bar:
        for i in range(ROUNDS + 5):
            for which, logits in enumerate((one, other)):
                clock = time.perf_counter()
                logits(pictures[i % ROUNDS])
                seconds[which, i] = time.perf_counter() - clock
            bar.update(1)
    medians = 1000 * np.median(seconds[:, 5:], axis=1)
    return float(medians[0]), float(medians[1])


def table(result: dict[str, Any]) -> str:
    """The export next to the model that it came from."""
    total = result["total"]
    lines = [f"{'':20} {'size':>9} {'batch 1':>10} {'accuracy, ' + result['split']:>22} {'same answer':>18} "
             f"{'max difference':>15}"]
    for name, at, more in (("PyTorch, float32", "pytorch_", ""), (result["format"], "", (
            f"{100 * result['agree'] / total:6.1f} % ({result['agree']}/{total})", f"{result['max_difference']:.1e}"))):
        correct = result[f"{at}correct"]
        accuracy = f"{100 * correct / total:.1f} % ({correct}/{total})"
        lines.append(f"{name:20} {result[f'{at}bytes'] / 1e6:6.2f} MB {result[f'{at}ms']:7.2f} ms {accuracy:>22}"
                     + (f" {more[0]:>18} {more[1]:>15}" if more else ""))
    return "\n".join(lines)


def main(argv: list[str]) -> dict[str, Any]:
    """Writes the file, prints the comparison, and returns it. Raises BadInput, and TrainingFault where they differ."""
    parser = cli.OneLineParser(prog="python -m kd export", description=__doc__, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--to", choices=tuple(SUFFIX), required=True)
    parser.add_argument("--int8", action="store_true", help="quantise (onnx alone), calibrated on train")
    parser.add_argument("--out", default="", help="default: beside PATH, such as runs/demo/student.onnx")
    args = parser.parse_args(argv)
    if args.int8 and args.to != "onnx":
        raise BadInput(f"--int8: only with --to onnx, not with --to {args.to}")
    if args.int8 and args.split == "train":
        raise BadInput("--int8: calibrated on train, so --split train would flatter it; use test or validation")
    if args.to == "onnx":
        need_onnx()
    folder = Path(args.model)
    out = Path(args.out or folder.parent / f"{folder.resolve().name}{'-int8' if args.int8 else ''}{SUFFIX[args.to]}")
    if out.is_dir():
        raise BadInput(f"--out {out}: is a folder; give a file")
    args.dataset = args.dataset or dataset_of(args.model)
    runtime.start("cpu", "off", "off")
    model, prep, size, data = open_both(args.model, args.dataset, args.seed, args.cache_dir)
    models.freeze(model)
    split = getattr(data, args.split)
    about = {"architecture": json.loads((folder / "config.json").read_text())["architecture"],
             "labels": json.dumps(data.classes), "size": str(size), "resize": str(math.floor(size / prep.crop_pct)),
             "interpolation": prep.interpolation}
    module = FromPixels(model, prep).eval()
    try:
        with tempfile.TemporaryDirectory(prefix=".kd-export-", dir=out.parent) as work:
            file = Path(work) / f"model{SUFFIX[args.to]}"
            with console.progress(1, f"exporting to {args.to}", "graph") as bar:
                if args.to == "onnx":
                    exported = write_onnx(module, size, about, file)
                elif args.to == "torch-export":
                    exported = write_torch_export(module, size, about, file)
                else:
                    exported = write_safetensors(model, prep, data.classes, {**about, "mean": json.dumps(prep.mean),
                                                                             "std": json.dumps(prep.std)}, file)
                bar.update(1)
            if args.int8:
                floats, file = file, file.with_name("int8.onnx")
                exported = quantize(floats, data.train, size, file)
            known = _by_torch(module.to(memory_format=torch.channels_last))  # what PyTorch is fastest with
            result = {"file": str(out), "format": args.to + (", int8" if args.int8 else ""), "model": args.model,
                      "dataset": args.dataset, "split": args.split, **compare(known, exported, split, size)}
            if not args.int8 and not result["max_difference"] <= TOLERANCE * result["largest_logit"]:
                raise TrainingFault(f"--to {args.to}: logits differ from PyTorch's by {result['max_difference']:.1e} "
                                    f"({result['agree']}/{len(split)} answers agree); {out} was not written")
            result["pytorch_ms"], result["ms"] = latency(known, exported, split, size)
            result["pytorch_bytes"] = (folder / "model.safetensors").stat().st_size
            result["bytes"] = file.stat().st_size
            with open(file, "rb") as written:
                os.fsync(written.fileno())
            os.replace(file, out)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"--out {out}: cannot be written ({getattr(error, 'strerror', None) or error}); give a "
                       f"file in a folder that exists and has room") from error
    print(json.dumps(result) if args.json else f"{table(result)}\nwritten: {out}")
    return result
