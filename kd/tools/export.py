"""A saved model as one file that runs without this code, checked against PyTorch on real pictures:

    python -m kd export runs/demo/student --to onnx [--dataset leaves] [--int8] [--split test] [--out FILE] [--json]

onnx, torch-export (.pt2): a graph from `pixels`, uint8 RGB `(B, 3, size, size)` of any B, to `logits`, float32
`(B, C)`. Normalisation is inside, so that nobody can get mean and std wrong. The caller turns a picture upright, lays
transparent parts over white, resizes and crops, as the file's metadata says: input, labels, size, resize,
interpolation.
safetensors: only the weights, under timm's names, with the same metadata and with mean and std, which the caller then
has to apply.
--int8 (onnx): static quantisation, QDQ, calibrated on pictures of train.

Everything is computed on the CPU in float32. A float export whose logits differ from PyTorch's is refused, and so is an
int8 export that is less accurate.
"""

import argparse
import contextlib
import copy
import json
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kd import BadInput, TrainingFault, models, one_line
from kd.data.frames import Split, center_crop
from kd.machine import console, runtime
from kd.machine.files import sync_file
from kd.scores import SIGNIFICANCE, mcnemar_p
from kd.tools import arguments
from kd.tools.evaluate import Opened, open_model_and_data

BATCH = 32
# Pictures of train. On three trained MobileNetV2, 64 changed an answer or two of 128, and 1000 none. With 256, neither
# entropy nor percentiles were better than the plain minimum and maximum.
CALIBRATION_PICTURES = 256
# How the weights are quantised, best first. No setting suits every network, so the ones after the first are for
# networks that it spoils. Activations are uint8 in all. Weights in the whole range of int8 are not among them: where a
# CPU lacks VNNI, sums of their products with uint8 overflow, which cost a MobileNetV2 2 points on AVX2.
INT8_SETTINGS: dict[str, dict[str, Any]] = {
    "uint8 weights, a scale per channel": {"weight_type": "QUInt8", "per_channel": True},
    # For channels whose weights are nearly zero, as MobileNetV3 has them. Their tiny scale is also that of the bias,
    # which then exceeds int32. onnxruntime raises such a scale, but only with signed weights.
    "7-bit weights, a scale per channel": {"weight_type": "QInt8", "per_channel": True, "reduce_range": True},
    "uint8 weights, a scale per tensor": {"weight_type": "QUInt8", "per_channel": False},
}
LARGEST_LOSS = 0.02     # of accuracy, by int8
# The share of the calibration pictures that get PyTorch's answer. With as many, a setting costs at most LARGEST_LOSS on
# them, and no other one is tried.
GOOD_AGREEMENT = 1 - LARGEST_LOSS
LATENCY_ROUNDS = 50
WARM_UP_ROUNDS = 5
TOLERANCE = 1e-4   # of the largest logit, or of 1 if that is larger: float32 sums in another order

Logits = Callable[[np.ndarray], np.ndarray]  # from uint8 (B, 3, size, size) to float32 (B, C)


def read_pixels(split: Split, samples: np.ndarray, size: int) -> np.ndarray:
    """uint8 `(B, 3, size, size)`, contiguous: the input of the exported graph."""
    return np.ascontiguousarray(center_crop(split.frames.read(samples), size).transpose(0, 3, 1, 2))


# ---- formats: each function writes `file`, and returns the logits that the file gives when it is read back ----------

def write_onnx(module: models.FromPixels, size: int, metadata: dict[str, str], file: Path) -> Logits:
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


def write_torch_export(module: models.FromPixels, size: int, metadata: dict[str, str], file: Path) -> Logits:
    """A .pt2 archive, whose metadata is in its file about.json."""
    program = torch.export.export(module, (_example(size),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file, extra_files={"about.json": json.dumps(metadata)})
    return torch_logits(torch.export.load(file).module())


def write_safetensors(module: models.FromPixels, size: int, metadata: dict[str, str], file: Path) -> Logits:
    """The weights, and mean and std in the metadata."""
    weights = {name: value.contiguous() for name, value in module.model.state_dict().items()}
    # not save_file, whose files only their owner may read
    file.write_bytes(safetensors.torch.save(weights, metadata={
        "format": "pt", **metadata, "mean": json.dumps(module.prep.mean), "std": json.dumps(module.prep.std)}))
    model = copy.deepcopy(module.model)
    model.load_state_dict(safetensors.torch.load_file(file))
    return torch_logits(models.FromPixels(model, module.prep).eval())


class Format(NamedTuple):
    """What `--to` can name."""

    suffix: str
    write: Callable[[models.FromPixels, int, dict[str, str], Path], Logits]


FORMATS = {"onnx": Format(".onnx", write_onnx),
           "torch-export": Format(".pt2", write_torch_export),
           "safetensors": Format(".safetensors", write_safetensors)}


def quantize(file: Path, pytorch: Logits, split: Split, size: int, out: Path) -> tuple[Logits, str]:
    """Write an int8 twin of the ONNX graph in `file` to `out`, and return its logits and its INT8_SETTINGS.

    Pictures of `split` calibrate it. They also choose the settings: those whose answers are most often PyTorch's. The
    split that the export is checked on takes no part in either.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process
    # evenly over the split, so that every class is met where samples are sorted by class
    samples = np.linspace(0, len(split) - 1, min(CALIBRATION_PICTURES, len(split))).astype(int)
    prepared, candidate = file.with_name("prepared.onnx"), file.with_name("candidate.onnx")
    quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)  # quantisation needs all shapes

    most, chosen = -1, ""
    for settings in INT8_SETTINGS:
        quantize_once(prepared, split, samples, size, settings, candidate)
        agree = compare(pytorch, onnx_logits(candidate), split, samples, size)["agree"]
        if agree > most:
            most, chosen = agree, settings
            os.replace(candidate, out)
        if most >= GOOD_AGREEMENT * len(samples):
            break

    import onnx
    # quantisation drops the metadata
    proto = onnx.load(out)
    onnx.helper.set_model_props(proto, {entry.key: entry.value for entry in onnx.load(file).metadata_props})
    onnx.save(proto, out)
    return onnx_logits(out), chosen


def quantize_once(prepared: Path, split: Split, samples: np.ndarray, size: int, settings: str, out: Path) -> None:
    """Calibrate the graph in `prepared` on these samples of `split`, and write it with these INT8_SETTINGS to `out`."""
    from onnxruntime import quantization

    class Pictures(quantization.CalibrationDataReader):
        """onnxruntime asks for one input after another, until there is none."""

        def __init__(self) -> None:
            self.remaining = list(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            if not self.remaining:
                return None
            bar.update(1)
            return {"pixels": read_pixels(split, np.array([self.remaining.pop(0)]), size)}

    options = dict(INT8_SETTINGS[settings])
    weight_type = quantization.QuantType[options.pop("weight_type")]
    logging.disable(logging.WARNING)    # a line for each bias that exceeds int32; the answers show what it costs
    try:
        with console.progress(len(samples), f"calibrating, {settings}") as bar:
            quantization.quantize_static(
                str(prepared), str(out), Pictures(), quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8, weight_type=weight_type,
                calibrate_method=quantization.CalibrationMethod.MinMax, **options)
    finally:
        logging.disable(logging.NOTSET)


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

def compare(pytorch: Logits, exported: Logits, split: Split, samples: np.ndarray, size: int) -> dict[str, Any]:
    """The two on these samples of `split`.

    The result has the largest difference of two logits (NaN if there is one), the largest logit (at least 1), how
    often both give the same answer, how often each is right, and how often only one of them is.
    """
    max_difference, largest_logit = 0.0, 1.0
    counts = dict.fromkeys(("agree", "correct", "pytorch_correct", "only_correct", "only_pytorch_correct"), 0)
    with console.progress(len(samples), "checking") as bar:
        for start in range(0, len(samples), BATCH):
            some = samples[start:start + BATCH]
            pixels, labels = read_pixels(split, some, size), split.labels[some]
            expected, given = pytorch(pixels), exported(pixels)

            # np.maximum hands a NaN on, which max would lose
            max_difference = float(np.maximum(max_difference, np.abs(expected - given).max()))
            largest_logit = max(largest_logit, float(np.abs(expected).max()))

            right, pytorch_right = given.argmax(1) == labels, expected.argmax(1) == labels
            for name, rows in (("agree", expected.argmax(1) == given.argmax(1)), ("correct", right),
                               ("pytorch_correct", pytorch_right), ("only_correct", right & ~pytorch_right),
                               ("only_pytorch_correct", pytorch_right & ~right)):
                counts[name] += int(rows.sum())
            bar.update(len(some))
    return {"total": len(samples), **counts, "max_difference": max_difference, "largest_logit": largest_logit}


def refuse_different(result: dict[str, Any], out: Path) -> None:
    """Raise TrainingFault for a float export whose logits are not PyTorch's."""
    # `not <=` is also true for a NaN
    if not result["max_difference"] <= TOLERANCE * result["largest_logit"]:
        raise TrainingFault(f"--to {result['format']}: logits differ from PyTorch's by {result['max_difference']:.1e} "
                            f"({result['agree']}/{result['total']} answers agree); {out} was not written")


def int8_loss(result: dict[str, Any]) -> tuple[float, float]:
    """The accuracy that int8 loses, and its p: how likely chance alone would make as large a difference."""
    loss = (result["pytorch_correct"] - result["correct"]) / result["total"]
    return loss, mcnemar_p(result["only_correct"], result["only_pytorch_correct"])


def refuse_inaccurate(result: dict[str, Any], out: Path) -> None:
    """Raise TrainingFault for an int8 export that loses more than LARGEST_LOSS of accuracy, and not by chance.

    Both must hold. On 30 pictures, two points are less than one picture, and one picture more or less is chance. On
    50,000 pictures the test finds any loss, also one that nobody minds.
    """
    loss, p = int8_loss(result)
    if loss > LARGEST_LOSS and p <= SIGNIFICANCE:
        raise TrainingFault(f"--int8: {100 * result['correct'] / result['total']:.1f} % of {result['split']} where "
                            f"PyTorch has {100 * result['pytorch_correct'] / result['total']:.1f} % "
                            f"({result['settings']}); {out} was not written, --force keeps it")


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

    lines = [
        f"{'':20} {'size':>9} {'batch 1':>10} {accuracy:>22} {'same answer':>18} {'max difference':>15}",
        cells("PyTorch, float32", "pytorch_"),
        f"{cells(result['format'], '')} {same:>18} {result['max_difference']:>15.1e}"]
    if result["settings"]:
        loss, p = int8_loss(result)
        chance = "" if loss <= LARGEST_LOSS else f"; exact McNemar p of the loss = {p:.2g}"
        if loss > LARGEST_LOSS and p > SIGNIFICANCE:
            chance += ": within chance on so few pictures"
        lines.append(f"int8: {result['settings']}{chance}")
    return "\n".join(lines)


# ---- the command ------------------------------------------------------------------------------------------------

def parse(argv: list[str]) -> tuple[argparse.Namespace, Path]:
    """The arguments, and the file to write. Raises BadInput where they do not fit each other."""
    parser = arguments.make_parser("export", __doc__)
    arguments.add_data_flags(parser)
    parser.add_argument("--to", choices=tuple(FORMATS), required=True)
    parser.add_argument("--int8", action="store_true", help="quantise (only onnx), calibrated on train")
    parser.add_argument("--force", action="store_true", help="keep an int8 file that is less accurate")
    parser.add_argument("--out", default="", help="default: beside PATH, such as runs/demo/student.onnx")
    arguments.add_json_flag(parser, "one JSON object instead of tables")
    args = parser.parse_args(argv)

    if args.int8 and args.to != "onnx":
        raise BadInput(f"--int8: only with --to onnx, not with --to {args.to}")
    if args.force and not args.int8:
        raise BadInput("--force: only with --int8; a float export that differs from PyTorch is broken")
    if args.int8 and args.split == "train":
        raise BadInput("--int8: calibrated on train, so --split train would flatter it; use test or validation")
    if args.to == "onnx":
        require_onnx()

    folder = Path(args.model)
    name = folder.resolve().name + ("-int8" if args.int8 else "") + FORMATS[args.to].suffix
    out = Path(args.out or folder.parent / name)
    if out.is_dir():
        raise BadInput(f"--out {out}: is a folder; give a file")
    if out.exists() and not out.is_file():      # such as /dev/null, which would be replaced
        raise BadInput(f"--out {out}: is a device or a pipe; give a file")
    return args, out


def main(argv: list[str]) -> dict[str, Any]:
    """Writes the file, prints the comparison with PyTorch, and returns it.

    Raises BadInput, and TrainingFault where the logits differ.
    """
    args, out = parse(argv)
    runtime.start("cpu", "off", "off")
    opened = open_model_and_data(args, [args.split, "train"] if args.int8 else [args.split])
    prep, size, split = opened.prep, opened.size, opened.splits[args.split]
    module = models.FromPixels(models.freeze(opened.model), prep).eval()

    try:
        # the file gets its name only once it has passed the check
        with tempfile.TemporaryDirectory(prefix=".kd-export-", dir=out.parent) as work:
            # ---- export ----
            file, settings = Path(work) / f"model{FORMATS[args.to].suffix}", ""
            with console.progress(1, f"exporting to {args.to}", "graph") as bar, converting(args.to, opened):
                exported = FORMATS[args.to].write(module, size, describe(opened), file)
                bar.update(1)
            pytorch = torch_logits(module.to(memory_format=torch.channels_last))  # in which PyTorch is fastest
            if args.int8:
                float_file, file = file, file.with_name("int8.onnx")
                with converting("int8", opened):
                    exported, settings = quantize(float_file, pytorch, opened.splits["train"], size, file)

            # ---- check ----
            result = {"file": str(out), "format": args.to + (", int8" if args.int8 else ""), "settings": settings,
                      "model": args.model, "dataset": opened.dataset, "split": args.split,
                      "split_of_run": opened.split_of_run,
                      **compare(pytorch, exported, split, np.arange(len(split)), size)}
            if not args.int8:
                refuse_different(result, out)
            elif not args.force:
                refuse_inaccurate(result, out)

            # ---- measure ----
            result["pytorch_ms"], result["ms"] = measure_latency(pytorch, exported, split, size)
            result["pytorch_bytes"] = (Path(args.model) / "model.safetensors").stat().st_size
            result["bytes"] = file.stat().st_size

            # ---- put in place ----
            sync_file(file)
            os.replace(file, out)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"--out {out}: cannot be written ({getattr(error, 'strerror', None) or error}); give a "
                       f"file in a folder that exists and has room") from error

    print(json.dumps(result) if args.json else f"{format_table(result)}\nwritten: {out}")
    return result


@contextlib.contextmanager
def converting(to: str, opened: Opened) -> Iterator[None]:
    """Turn whatever a converter raises of a network that it does not know into a TrainingFault."""
    try:
        yield
    except (OSError, safetensors.SafetensorError, BadInput, TrainingFault):
        raise
    except Exception as error:
        raise TrainingFault(f"{models.architecture(opened.model)} cannot be converted to {to}: {one_line(error)}"
                            ) from error


def describe(opened: Opened) -> dict[str, str]:
    """The metadata of the file: the classes, and what the caller does to a picture."""
    side = math.floor(opened.size / opened.prep.crop_pct)
    return {"architecture": models.architecture(opened.model), "labels": json.dumps(opened.classes),
            "input": "RGB, upright (EXIF orientation applied), transparent parts over white, the shorter side "
                     f"resized to {side} pixels ({opened.prep.interpolation}), then the central {opened.size} x "
                     f"{opened.size} pixels",
            "size": str(opened.size), "resize": str(side), "interpolation": opened.prep.interpolation}
