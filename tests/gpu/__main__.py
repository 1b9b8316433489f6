"""`python -m tests.gpu OUT`: all that only a GPU can show, in less than 9 minutes on one card such as an H100.

    python -m tests.gpu OUT [--only tests,waits,compare-128]

It runs the tests marked `cuda`, looks for places where the loop waits for the GPU, and times the loop and the loss.
Nothing is downloaded: the pictures are drawn, and the weights are random. It needs torch, timm, numpy, pillow,
safetensors and pytest.

compare-128-compiled, compare-8-compiled and compare-1024-compiled also time the loops of others compiled. They run
only if `--only` names them, since compiling those loops takes minutes.

Each part is a process of its own with a limit, so one that fails does not stop the others. OUT/PART.json has what it
found, or its last lines. Exit status: 0 if all parts ended well, 1 otherwise, 2 where there is no GPU.
"""

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kd.machine.files import write_atomic
from tests.gpu import DEVICE, REHEARSAL, stand_ins

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 525             # seconds, after which nothing starts
LAST_LINES = 40
ENOUGH_MEMORY = 60e9    # bytes of a card on which compilations can run beside the tests
COMPILED_BY = 240       # seconds from the begin, after which those compilations are ended
UNTIMED = ("tests", "waits")    # parts beside which they may run
LONG = ("compare-128-compiled", "compare-8-compiled", "compare-1024-compiled")     # only where asked for


class Part(NamedTuple):
    """One process."""

    name: str
    seconds: float      # its limit
    arguments: list[str]


def parts(photos: Path) -> list[Part]:
    """In the order of what is most worth knowing. photos: a folder of pictures, which are made as large as asked."""
    if REHEARSAL:
        small = ["--dataset", str(photos), "--size", "32", "--teacher", "test_resnet", "--student",
                 "test_efficientnet", "--steps", "2", "--device", "cpu", "--rounds", "2"]
        compare = [Part("compare-8", 300, ["bench", "compare", "--json", "--batch-size", "8", *small])]
        return [Part("tests", 300, ["-k", "loss and 1000 or named"]), Part("waits", 300, []), *compare,
                Part("loss", 300, ["bench", "loss", "--json", "--device", "cpu", "--shapes", "4x3", "--rounds", "2"]),
                Part("ladder", 300, ["bench", "ladder", "--json", "--batch-size", "8", *small])]

    def common(batch: str, size: str, steps: str) -> list[str]:
        # `--compile on`, since the few steps of a block would not be compiled by `auto`
        return ["--json", "--dataset", str(photos), "--batch-size", batch, "--size", size, "--steps", steps, "--device",
                "cuda", "--compile", "on"]

    # 1024 pictures of 224 px and what a step in float32 keeps of them are more than 80 GB.
    blocks = {"128": common("128", "224", "10"), "8": common("8", "224", "40"), "1024": common("1024", "128", "4")}
    compare = [Part(f"compare-{batch}", 110, ["bench", "compare", *flags, "--minutes", "0.8"])
               for batch, flags in blocks.items()]
    compiled = [Part(name, 400, [*part.arguments, "--compiled"]) for name, part in zip(LONG, compare, strict=True)]
    return [Part("tests", 200, []), Part("waits", 120, []), *compare, Part("loss", 60, ["bench", "loss", "--json"]),
            Part("ladder", 110, ["bench", "ladder", *blocks["128"], "--minutes", "0.8"]), *compiled]


# ---- within the process of a part --------------------------------------------------------------------------

def measure(name: str, arguments: list[str]) -> Any:
    """What a part finds."""
    stand_ins.install(draw=False)
    if name == "tests":
        return run_tests(arguments)
    if name == "waits":
        from tests.gpu import waits
        return waits.measure()

    from kd import bench
    with contextlib.redirect_stdout(io.StringIO()) as said:
        bench.main(arguments[1:])
    return [json.loads(line) for line in said.getvalue().splitlines()]


def run_tests(arguments: list[str]) -> dict[str, Any]:
    """The tests marked `cuda`: how many passed, and what the others said."""
    import pytest
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    others: list[dict[str, str]] = []
    seconds: dict[str, float] = {}

    class Reporter:
        def pytest_runtest_logreport(self, report: Any) -> None:
            seconds[report.nodeid] = round(seconds.get(report.nodeid, 0) + report.duration, 1)
            if report.when == "call" or not report.passed:
                counts[report.outcome] += 1
                if not report.passed:
                    lines = str(report.longrepr).splitlines()[-LAST_LINES:]
                    others.append({"test": report.nodeid, "outcome": report.outcome, "said": "\n".join(lines)})

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                counts["failed"] += 1
                others.append({"test": report.nodeid, "outcome": "failed", "said": str(report.longrepr)[-4000:]})

    status = pytest.main(["-o", "addopts=", "-q", "-p", "no:cacheprovider", "-m", "cuda", str(ROOT / "tests" / "gpu"),
                          *arguments], plugins=[Reporter()])
    slowest = dict(sorted(seconds.items(), key=lambda each: -each[1])[:20])
    return {**counts, "status": int(status), "not passed": others, "slowest": slowest}


# ---- the processes ------------------------------------------------------------------------------------------

class Process:
    """A part in a process of its own, whose group can be ended."""

    def __init__(self, part: Part, folder: Path) -> None:
        self.part, self.begin = part, time.monotonic()
        self.log, self.found = folder / f"{part.name}.log", folder / f"{part.name}.json"
        command = [sys.executable, "-m", "tests.gpu", str(self.found), "--part", part.name, "--", *part.arguments]
        if "--dataset" in part.arguments:   # decoded pictures and logits go where they are removed in the end
            command += ["--cache-dir", str(folder / "cache")]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                            env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True)

    def wait(self, seconds: float) -> dict[str, Any]:
        """What it found, once it has ended, or was ended after so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(seconds, 0))
        code = self.process.poll()
        if code is None:
            self.end()
        content: dict[str, Any] = {"part": self.part.name, "arguments": self.part.arguments,
                                   "ended": "at its limit" if code is None else "well" if code == 0 else "by an error",
                                   "seconds": round(time.monotonic() - self.begin, 1)}
        if self.found.exists():
            content["result"] = json.loads(self.found.read_text())
        if code != 0:
            content["last_lines"] = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        return content

    def end(self) -> None:
        """Kill it and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_all(chosen: list[Part], out: Path, total: float = TOTAL) -> list[dict[str, Any]]:
    """Run the parts, one after the other, and write what each found."""
    begin = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as ending:
        folder, compiling = Path(name), []
        untimed = [part for part in chosen if part.name in UNTIMED]
        if untimed and room_for_compilations():
            # Compiling takes most of the time of the comparisons. What is compiled is kept on the disk.
            for part in chosen:
                if part.name.startswith("compare") and part.name not in LONG:
                    compiling.append(Process(Part(f"{part.name}-first", COMPILED_BY,
                                                  [*part.arguments, "--rounds", "2"]), folder))
                    ending.callback(compiling[-1].end)
        for part in chosen:
            left = total - (time.monotonic() - begin)
            if left < 10:
                content: dict[str, Any] = {"part": part.name, "arguments": part.arguments, "ended": "before it began",
                                           "seconds": 0, "last_lines": [f"no time left of {total} s"]}
            else:
                print(f"{part.name}: at most {min(part.seconds, left):.0f} s", file=sys.stderr, flush=True)
                content = Process(part, folder).wait(min(part.seconds, left))
            if untimed and part is untimed[-1]:     # from here on, things are timed
                for first in compiling:
                    ahead = first.wait(COMPILED_BY - (time.monotonic() - begin))
                    print(f"{ahead['part']}: ended {ahead['ended']} after {ahead['seconds']} s",
                          *ahead.get("last_lines", [])[-2:], sep="\n  ", file=sys.stderr, flush=True)
                ending.close()
            results.append(content)
            write_atomic(out / f"{part.name}.json", json.dumps(content, indent=1).encode())
            print(summary(content), flush=True)
    return results


def room_for_compilations() -> bool:
    """Whether the card has room for the comparisons beside the tests."""
    return DEVICE.type == "cuda" and torch.cuda.get_device_properties(0).total_memory > ENOUGH_MEMORY


def summary(content: dict[str, Any]) -> str:
    """A part in a few lines."""
    head = f"{content['part']}: ended {content['ended']} after {content['seconds']} s"
    if "result" not in content:
        return "\n  ".join([head, *content["last_lines"][-3:]])
    result, lines = content["result"], []
    if content["part"] == "tests":
        lines = [", ".join(f"{result[key]} {key}" for key in ("passed", "failed", "skipped"))]
        lines += [f"FAILED {each['test']}" for each in result["not passed"] if each["outcome"] == "failed"]
    elif content["part"] == "waits":
        from tests.gpu import waits
        lines = [waits.summary(name, modes) for name, modes in result.items()]
    elif content["part"].startswith("compare"):
        lines = [f"{key} {value:.2f}" for key, value in result[0].items()
                 if key.endswith(("img_s", "ratio")) or "_over_" in key and not key.endswith("_95")]
    elif content["part"] == "loss":
        lines = [f"{row['shape'][0]} x {row['shape'][1]}: {row['fused_ms']:.3f} ms, {row['vs_eager']:.2f} x eager, "
                 f"{row['vs_compiled']:.2f} x compiled" for row in result]
    elif content["part"] == "ladder":
        lines = [f"{rung['img_s']:.1f} images/s, {rung['name']}" for rung in result[0]["rungs"]]
    return "\n  ".join([head, *lines])


def main(argv: list[str]) -> int:
    """Run what is asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the JSON files")
    parser.add_argument("--only", help="names of parts, separated by commas")
    parser.add_argument("--part", help=argparse.SUPPRESS)       # in the process of that part
    end = argv.index("--") if "--" in argv else len(argv)       # of our own arguments; then come those of the part
    args = parser.parse_args(argv[:end])
    if args.part:
        found = measure(args.part.removesuffix("-first"), argv[end + 1:])
        write_atomic(args.out, json.dumps(found).encode())
        return int(args.part == "tests" and found["status"] != 0)

    if not torch.cuda.is_available() and not REHEARSAL:
        print("tests.gpu: error: torch.cuda.is_available() is False: there is no GPU here", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    photos = tempfile.TemporaryDirectory()
    known = {part.name: part for part in parts(Path(photos.name))}
    names = args.only.split(",") if args.only else [name for name in known if name not in LONG]
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"tests.gpu: error: --only {unknown[0]}: known are {', '.join(known)}", file=sys.stderr)
        return 2

    with photos as folder:
        stand_ins.install()
        from tests.conftest import make_photos
        make_photos(Path(folder))
        results = run_all([known[name] for name in names], args.out)
    everything = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
                  "parts": {each["part"]: {"ended": each["ended"], "seconds": each["seconds"]} for each in results}}
    write_atomic(args.out / "summary.json", json.dumps(everything, indent=1).encode())
    return int(any(each["ended"] != "well" for each in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
