"""A saved model as one file that runs without this code, checked against PyTorch on real pictures:

    python -m kd export runs/demo/student --to onnx [--dataset leaves] [--int8] [--split test] [--out FILE] [--json]

onnx, torch-export (.pt2): a graph from `pixels`, uint8 RGB `(B, 3, size, size)` of any B, to `logits`, float32
`(B, C)`. Normalisation is inside, so that nobody can get mean and std wrong. The caller only resizes and crops, as the
file's metadata says: labels, size, resize, interpolation.
safetensors: only the weights, under timm's names, with the same metadata and with mean and std, which the caller then
has to apply.
--int8 (onnx): static quantisation, QDQ, one scale a channel of the weights, calibrated on pictures of train.

Everything is computed on the CPU in float32. A float export whose logits differ from PyTorch's is refused.
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
from typing import Any, Callable, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kd import BadInput, TrainingFault, models
from kd.data.frames import Split, center_crop
from kd.machine import console, runtime
from kd.tools import arguments
from kd.tools.evaluate import dataset_of_run, open_model_and_data

BATCH = 32
# Pictures of train. On three trained MobileNetV2, 64 changed an answer or two of 128, and 1000 none. With 256, neither
# entropy nor percentiles were better than the plain minimum and maximum, and one scale a tensor was worse by 1 to 2.
CALIBRATION_PICTURES = 256
LATENCY_ROUNDS = 50
WARM_UP_ROUNDS = 5
TOLERANCE = 1e-4   # of the largest logit, or of 1 if that is larger: float32 sums in another order

Logits = Callable[[np.ndarray], np.ndarray]  # from uint8 (B, 3, size, size) to float32 (B, C)


class FromPixels(nn.Module):
    """uint8 `(B, 3, size, size)` to float32 logits `(B, C)`: the model with its normalisation inside."""

    def __init__(self, model: nn.Module, prep: models.Preprocessing) -> None:
        super().__init__()
        self.model, self.prep = model, prep

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(models.normalize(pixels, self.prep))


def read_pixels(split: Split, samples: np.ndarray, size: int) -> np.ndarray:
    """uint8 `(B, 3, size, size)`, contiguous: the input of the exported graph."""
    return np.ascontiguousarray(center_crop(split.frames.read(samples), size).transpose(0, 3, 1, 2))


# ---- formats: each function writes `file`, and returns the logits that the file gives when it is read back ----------

def write_onnx(module: FromPixels, size: int, metadata: dict[str, str], file: Path) -> Logits:
    """An ONNX graph, by torch's exporter."""
    import onnx
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside of torch's exporter
        program = torch.onnx.export(module, (_example(size),), dynamo=True, verbose=False, input_names=["pixels"],
                                    output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, file)
    return onnx_logits(file)


def write_torch_export(module: FromPixels, size: int, metadata: dict[str, str], file: Path) -> Logits:
    """A .pt2 archive, whose metadata is in its file about.json."""
    program = torch.export.export(module, (_example(size),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file, extra_files={"about.json": json.dumps(metadata)})
    return torch_logits(torch.export.load(file).module())


def write_safetensors(module: FromPixels, size: int, metadata: dict[str, str], file: Path) -> Logits:
    """The weights, and mean and std in the metadata."""
    weights = {name: value.contiguous() for name, value in module.model.state_dict().items()}
    safetensors.torch.save_file(weights, file, metadata={
        "format": "pt", **metadata, "mean": json.dumps(module.prep.mean), "std": json.dumps(module.prep.std)})
    classes = tuple(json.loads(metadata["labels"]))
    model = models.create("model", metadata["architecture"], classes, str(file), say=lambda line: None)
    return torch_logits(FromPixels(model.eval(), module.prep))


class Format(NamedTuple):
    """What `--to` can name."""

    suffix: str
    write: Callable[[FromPixels, int, dict[str, str], Path], Logits]


FORMATS = {"onnx": Format(".onnx", write_onnx),
           "torch-export": Format(".pt2", write_torch_export),
           "safetensors": Format(".safetensors", write_safetensors)}


def quantize(file: Path, split: Split, size: int, out: Path) -> Logits:
    """Write the int8 twin of the ONNX graph in `file` to `out`, calibrated on pictures of `split`."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process
    # evenly over the split, so that every class is met where samples are sorted by class
    samples = np.linspace(0, len(split) - 1, min(CALIBRATION_PICTURES, len(split))).astype(int)

    class Pictures(quantization.CalibrationDataReader):
        """onnxruntime asks for one input after another, until there is none."""

        def __init__(self) -> None:
            self.remaining = list(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            if not self.remaining:
                return None
            bar.update(1)
            return {"pixels": read_pixels(split, np.array([self.remaining.pop(0)]), size)}

    prepared = file.with_name("prepared.onnx")
    quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)  # quantisation needs all shapes
    with console.progress(len(samples), "calibrating") as bar:
        quantization.quantize_static(str(prepared), str(out), Pictures(), quant_format=quantization.QuantFormat.QDQ,
                                     per_channel=True, activation_type=quantization.QuantType.QUInt8,
                                     weight_type=quantization.QuantType.QInt8,
                                     calibrate_method=quantization.CalibrationMethod.MinMax)

    # quantisation drops the metadata
    proto = onnx.load(out)
    onnx.helper.set_model_props(proto, {entry.key: entry.value for entry in onnx.load(file).metadata_props})
    onnx.save(proto, out)
    return onnx_logits(out)


def onnx_logits(file: Path) -> Logits:
    """What onnxruntime computes on the CPU, with as many threads as torch has."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # A thread that spins while it waits for the next picture would take its core from PyTorch, whose latency is
    # measured in turns with this one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(["logits"], {"pixels": pixels})[0]


def torch_logits(module: nn.Module) -> Logits:
    """What PyTorch computes."""
    def logits(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(pixels)).numpy()
    return logits


def _example(size: int) -> Tensor:
    """Two pictures, because the exporter would take a batch of one for a constant."""
    return torch.zeros(2, 3, size, size, dtype=torch.uint8)


def require_onnx() -> None:
    """Raise BadInput where a package that ONNX needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BadInput(f"--to onnx: {error.name} is not installed: pip install onnx onnxruntime onnxscript") from error
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


# ---- the check ------------------------------------------------------------------------------------------------

def compare(pytorch: Logits, exported: Logits, split: Split, size: int) -> dict[str, Any]:
    """The two on every picture of `split`.

    The result has the largest difference of two logits (NaN if there is one), the largest logit (at least 1), how
    often both give the same answer, and how often each is right.
    """
    max_difference, largest_logit = 0.0, 1.0
    agree = pytorch_correct = exported_correct = 0
    with console.progress(len(split), "checking") as bar:
        for start in range(0, len(split), BATCH):
            samples = np.arange(start, min(start + BATCH, len(split)))
            pixels, labels = read_pixels(split, samples, size), split.labels[samples]
            expected, given = pytorch(pixels), exported(pixels)

            # np.maximum hands a NaN on, which max would lose
            max_difference = float(np.maximum(max_difference, np.abs(expected - given).max()))
            largest_logit = max(largest_logit, float(np.abs(expected).max()))

            agree += int((expected.argmax(1) == given.argmax(1)).sum())
            pytorch_correct += int((expected.argmax(1) == labels).sum())
            exported_correct += int((given.argmax(1) == labels).sum())
            bar.update(len(samples))
    return {"total": len(split), "agree": agree, "max_difference": max_difference, "largest_logit": largest_logit,
            "correct": exported_correct, "pytorch_correct": pytorch_correct}


def measure_latency(first: Logits, second: Logits, split: Split, size: int) -> tuple[float, float]:
    """Median milliseconds of one picture for each, measured in turns after a warm-up."""
    rounds = WARM_UP_ROUNDS + LATENCY_ROUNDS
    pictures = [read_pixels(split, np.array([i % len(split)]), size) for i in range(LATENCY_ROUNDS)]
    seconds = np.zeros((2, rounds))
    with console.progress(rounds, "timing") as bar:
        for i in range(rounds):
            for which, logits in enumerate((first, second)):
                start = time.perf_counter()
                logits(pictures[i % LATENCY_ROUNDS])
                seconds[which, i] = time.perf_counter() - start
            bar.update(1)
    medians = 1000 * np.median(seconds[:, WARM_UP_ROUNDS:], axis=1)
    return float(medians[0]), float(medians[1])


def format_table(result: dict[str, Any]) -> str:
    """The exported model below the one in PyTorch."""
    total = result["total"]
    accuracy = f"accuracy, {result['split']}"
    same = f"{100 * result['agree'] / total:6.1f} % ({result['agree']}/{total})"

    def cells(name: str, prefix: str) -> str:
        correct = result[f"{prefix}correct"]
        share = f"{100 * correct / total:.1f} % ({correct}/{total})"
        return f"{name:20} {result[f'{prefix}bytes'] / 1e6:6.2f} MB {result[f'{prefix}ms']:7.2f} ms {share:>22}"

    return "\n".join([
        f"{'':20} {'size':>9} {'batch 1':>10} {accuracy:>22} {'same answer':>18} {'max difference':>15}",
        cells("PyTorch, float32", "pytorch_"),
        f"{cells(result['format'], '')} {same:>18} {result['max_difference']:>15.1e}"])


# ---- the command ------------------------------------------------------------------------------------------------

def parse(argv: list[str]) -> tuple[argparse.Namespace, Path]:
    """The arguments, and the file to write. Raises BadInput where they do not fit each other."""
    parser = arguments.make_parser("export", __doc__)
    arguments.add_data_flags(parser)
    parser.add_argument("--to", choices=tuple(FORMATS), required=True)
    parser.add_argument("--int8", action="store_true", help="quantise (only onnx), calibrated on train")
    parser.add_argument("--out", default="", help="default: beside PATH, such as runs/demo/student.onnx")
    arguments.add_json_flag(parser, "one JSON object instead of tables")
    args = parser.parse_args(argv)

    if args.int8 and args.to != "onnx":
        raise BadInput(f"--int8: only with --to onnx, not with --to {args.to}")
    if args.int8 and args.split == "train":
        raise BadInput("--int8: calibrated on train, so --split train would flatter it; use test or validation")
    if args.to == "onnx":
        require_onnx()

    folder = Path(args.model)
    name = folder.resolve().name + ("-int8" if args.int8 else "") + FORMATS[args.to].suffix
    out = Path(args.out or folder.parent / name)
    if out.is_dir():
        raise BadInput(f"--out {out}: is a folder; give a file")
    return args, out


def main(argv: list[str]) -> dict[str, Any]:
    """Writes the file, prints the comparison with PyTorch, and returns it.

    Raises BadInput, and TrainingFault where the logits differ.
    """
    args, out = parse(argv)
    dataset = args.dataset or dataset_of_run(args.model)
    runtime.start("cpu", "off", "off")
    model, prep, size, data = open_model_and_data(args.model, dataset, args.seed, args.cache_dir)
    module = FromPixels(models.freeze(model), prep).eval()
    split = getattr(data, args.split)
    metadata = {"architecture": models.architecture(model), "labels": json.dumps(data.classes), "size": str(size),
                "resize": str(math.floor(size / prep.crop_pct)), "interpolation": prep.interpolation}

    try:
        # the file gets its name only once it has passed the check
        with tempfile.TemporaryDirectory(prefix=".kd-export-", dir=out.parent) as work:
            # ---- export ----
            file = Path(work) / f"model{FORMATS[args.to].suffix}"
            with console.progress(1, f"exporting to {args.to}", "graph") as bar:
                exported = FORMATS[args.to].write(module, size, metadata, file)
                bar.update(1)
            if args.int8:
                float_file, file = file, file.with_name("int8.onnx")
                exported = quantize(float_file, data.train, size, file)

            # ---- check ----
            pytorch = torch_logits(module.to(memory_format=torch.channels_last))  # in which PyTorch is fastest
            result = {"file": str(out), "format": args.to + (", int8" if args.int8 else ""), "model": args.model,
                      "dataset": dataset, "split": args.split, **compare(pytorch, exported, split, size)}
            # `not <=` is also true for a NaN
            if not args.int8 and not result["max_difference"] <= TOLERANCE * result["largest_logit"]:
                raise TrainingFault(f"--to {args.to}: logits differ from PyTorch's by {result['max_difference']:.1e} "
                                    f"({result['agree']}/{len(split)} answers agree); {out} was not written")

            # ---- measure ----
            result["pytorch_ms"], result["ms"] = measure_latency(pytorch, exported, split, size)
            result["pytorch_bytes"] = (Path(args.model) / "model.safetensors").stat().st_size
            result["bytes"] = file.stat().st_size

            # ---- put in place ----
            with open(file, "rb") as written:
                os.fsync(written.fileno())
            os.replace(file, out)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"--out {out}: cannot be written ({getattr(error, 'strerror', None) or error}); give a "
                       f"file in a folder that exists and has room") from error

    print(json.dumps(result) if args.json else f"{format_table(result)}\nwritten: {out}")
    return result
