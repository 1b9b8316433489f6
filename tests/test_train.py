"""The loop: one step against one written by hand, whole runs on a tiny configuration, processes that are killed."""

import concurrent.futures
import copy
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train
from kd import BadInput, TrainingFault, features, models
from kd import predict as prediction
from kd import teacher as teacher_module
from kd.data import frames
from kd.data.frames import center_crop
from kd.data.decoding import open_picture, to_frame
from kd.fast import folding
from kd.logits import LogitStore
from kd.machine import checkpoint, files, runtime
from tests.helpers import processes, toy
from tests.helpers.runs import command_line, identical, step, watch_teacher


def test_one_step_is_the_step_that_one_would_write_by_hand():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    twin = copy.deepcopy(model)
    x, labels, soft = torch.randn(6, 3, 2, 2), torch.randint(3, (6,)), torch.randn(6, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0, fused=True)
    for number in range(3):
        loss, norm = step(model, optimizer, x, labels, soft, clip=0.7)
        logits = twin(x)
        expected = 0.5 * F.cross_entropy(logits, labels) + 0.5 * 25 * F.kl_div(
            F.log_softmax(logits / 5, 1), F.softmax(soft / 5, 1), reduction="batchmean")
        gradients = torch.autograd.grad(expected, list(twin.parameters()))
        total = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert norm.item() == pytest.approx(total, rel=1e-5)
        if number == 0:  # Adam's first step moves every weight by lr against the sign of its gradient
            for before, now, gradient in zip(twin.parameters(), model.parameters(), gradients, strict=True):
                moved = now - before
                clear = gradient.abs() > 1e-4
                assert torch.allclose(moved[clear], -0.1 * gradient[clear].sign(), atol=1e-3)
        twin.load_state_dict(model.state_dict())
    assert all(p.grad is None for p in model.parameters())


def test_the_learning_rate_rises_and_falls_as_the_flags_say():
    rates = [train.learning_rate(step, 100, 1.0, "linear", 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0 and rates[55] == pytest.approx(0.5)
    assert train.learning_rate(50, 100, 2.0, "cosine", 0.0) == pytest.approx(1.0)
    # the tutorial's own: linear from the peak to zero, no warm-up
    assert [train.learning_rate(step, 4, 1.0, "linear", 0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_a_run_leaves_what_it_promises(tiny, capsys):
    config = dataclasses.replace(tiny, control=True)
    result = train.main(config)
    out = Path(config.out)
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    for role in ("teacher", "control", "student"):
        row = result[role]
        assert row["test_accuracy"] == row["test_correct"] / row["test_total"] and row["test_total"] == 12
        loaded = timm.create_model(f"local-dir:{out / role}", pretrained=True)
        assert models.parameters(loaded) == row["params"]
    assert result["config"] == dataclasses.asdict(config) and result["environment"]["torch"] == torch.__version__
    assert result["images_per_second"] > 0 and result["seconds"] > 0
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["role"], entry["epoch"]) for entry in history] == [
        ("teacher", 1), ("control", 1), ("control", 2), ("student", 1), ("student", 2)]
    # K = 1: the teacher is asked for each sample once, in the first epoch: ceil(42 / 8) batches
    assert [entry["teacher_batches"] for entry in history[3:]] == [5, 5]
    # the rate that is logged is the one of the epoch's last step, not the peak
    rates = [train.learning_rate(step, 10, config.lr, "linear", 0.0) for step in (4, 9)]
    assert [entry["lr"] for entry in history[3:]] == rates and rates[0] < config.lr
    best = max(entry["accuracy"] for entry in history if entry["role"] == "student")
    assert result["student"]["validation_accuracy"] == best
    said = capsys.readouterr().out
    assert "gain from the teacher (student − control): " in said and "headroom (teacher − control): " in said
    assert "(" + str(result["student"]["test_correct"]) + "/12)" in said
    assert list((out / "tensorboard").glob("events*"))


def test_the_second_run_gives_the_same_student_and_never_calls_the_teacher(tiny):
    config = dataclasses.replace(tiny, views=2, augment="crop", epochs=3)
    first = train.main(config)
    second = train.main(dataclasses.replace(config, out=config.out + "-again"))
    assert first["teacher_batches"] == 10 and second["teacher_batches"] == 0
    assert first["student"] == second["student"]
    one, other = (checkpoint.read(Path(o) / "last.ckpt") for o in (config.out, config.out + "-again"))
    identical(one["model"], other["model"])


def opened(photos: Path, cache: Path, size: int = 32, interpolation: str = "bilinear") -> train.Data:
    table = train.open_dataset(str(photos))
    return train.Data(table.classes, **train.decode(table, size=size, crop_pct=0.875, interpolation=interpolation,
                                                    cache_dir=cache))


def classifier(name: str, data: train.Data, weights: str = "none") -> train.Classifier:
    """Frozen, at 32 px."""
    torch.manual_seed(0)
    model = models.freeze(models.create("teacher", name, data.classes, weights)).to(memory_format=torch.channels_last)
    return train.Classifier(model, models.preprocessing(model), 32, data.classes,
                            runtime.start("cpu", "off", "off", "off"))


def test_stored_logits_are_the_live_teachers_under_shuffles_epochs_and_batch_sizes(tiny):
    config = dataclasses.replace(tiny, augment="crop", views=2, epochs=2, kernels="off")   # BatchNorm is not folded
    train.main(config)
    prep = models.preprocessing(models.create("teacher", config.teacher, ("a", "b", "c")))
    table = train.open_dataset(config.dataset)
    data = train.Data(table.classes, **train.decode(table, size=32, crop_pct=prep.crop_pct,
                                                    interpolation=prep.interpolation, cache_dir=config.cache_dir))
    teacher = classifier(config.teacher, data, str(Path(config.out) / "teacher"))
    forward = models.FromPixels(teacher.model, teacher.prep)
    # the run's own store of its views, found by its files rather than by remaking its key
    logits = Path(config.cache_dir) / "logits"
    key, = [key for key in (json.loads(path.read_text()) for path in logits.glob("*/key.json")) if "augment" in key]
    store, seen = LogitStore(logits, key, 3), 0
    views = train.Views(0, 32, train.AUGMENTATIONS["crop"], 2)
    for batch_size, tolerance in ((8, 0.0), (5, 1e-5)):
        for epoch in range(2):
            for batch in train.load_batches(data.train, views, epoch, batch_size, 0, torch.device("cpu"), store.get):
                assert batch.stored is not None
                with torch.no_grad():
                    assert (batch.stored - forward(batch.pixels)).abs().max() <= tolerance
                seen += len(batch.samples)
    assert seen == 4 * 42 and store.teacher_batches == 0


def test_a_teacher_of_another_interpolation_sees_the_same_views_from_pictures_of_its_own(photos, tmp_path):
    ours, theirs = (opened(photos, tmp_path, interpolation=name).train for name in ("bilinear", "bicubic"))
    views = train.Views(0, 32, train.AUGMENTATIONS["crop"], 0)
    model = classifier("test_resnet", opened(photos, tmp_path))
    teacher = train.Teacher(model, theirs, views, train.StoreOptions(tmp_path))
    for one, other in zip(*(train.load_batches(split, views, 0, 8, 0, torch.device("cpu"), teacher.store.get)
                            for split in (ours, theirs)), strict=True):
        assert not torch.equal(one.pixels, other.pixels)
        with torch.no_grad():
            expected = teacher.forward(other.pixels)
        assert torch.equal(teacher.outputs(one), expected)
        teacher.store.flush()
        assert torch.equal(teacher.outputs(other), expected)
        stored = teacher.store.get(one.view, one.samples)
        assert stored is not None and torch.equal(stored, expected)
    assert teacher.store.teacher_batches == 2 * 5


def test_a_teacher_of_another_size_sees_the_same_views_with_more_pixels(photos, tmp_path):
    small, large = (next(train.load_batches(opened(photos, tmp_path, size).train,
                                            train.Views(0, size, train.AUGMENTATIONS["crop"], 0), 0, 8, 0,
                                            torch.device("cpu"))) for size in (16, 32))
    assert np.array_equal(small.samples, large.samples)
    halved, pixels = torch.nn.functional.avg_pool2d(large.pixels.float(), 2), small.pixels.float()
    # the same place of the same picture: a mirrored one is another
    assert 2 * (halved - pixels).abs().mean() < (halved.flip(3) - pixels).abs().mean()


@pytest.mark.parametrize("module", [models, frames, features])
def test_logits_are_not_served_to_other_code(tiny, monkeypatch, tmp_path, module):
    """Such as another normalisation: the answers that are kept are those of the code that computed them."""
    assert train.main(tiny)["teacher_batches"] == 5
    changed = tmp_path / "changed.py"
    changed.write_text(Path(str(module.__file__)).read_text().replace("255", "256") + "\n")
    monkeypatch.setattr(module, "__file__", str(changed))
    answers = files.code_digest(features, folding, models, prediction, frames)
    assert answers != teacher_module.ANSWERS
    monkeypatch.setattr(teacher_module, "ANSWERS", answers)
    assert train.main(dataclasses.replace(tiny, out=tiny.out + "-again"))["teacher_batches"] == 5


def test_a_run_with_a_larger_teacher_keeps_both_sizes_and_asks_it_once(tiny):
    config = dataclasses.replace(tiny, teacher_size=48, views=2, augment="crop")
    result = train.main(config)
    assert result["teacher_batches"] == 10
    machine = runtime.start("cpu", "off", "off")
    sizes = [models.open_saved(f"{config.out}/{role}", machine).size for role in ("teacher", "student")]
    assert sizes == [48, 32]
    again = train.main(dataclasses.replace(config, out=config.out + "-again"))
    assert again["teacher_batches"] == 0 and again["student"] == result["student"]


def test_a_size_that_the_teacher_does_not_take_names_its_flag(tiny):
    with pytest.raises(BadInput, match="--teacher-size"):
        train.main(dataclasses.replace(tiny, teacher="test_vit", teacher_size=50))


def test_without_a_share_in_the_loss_the_teacher_changes_nothing(tiny):
    result = train.main(dataclasses.replace(tiny, control=True, kd_weight=0.0))
    assert result["student"] == result["control"] and result["teacher_batches"] == 0


def test_label_smoothing_is_of_student_and_control_and_never_of_the_teacher(tiny):
    config = dataclasses.replace(tiny, control=True, kd_weight=0.5, allow_weak_teacher=True)
    results = [train.main(dataclasses.replace(config, label_smoothing=smoothing, out=f"{config.out}-{smoothing}"))
               for smoothing in (0.0, 0.3)]
    same = {role: results[0][role]["loss"] == results[1][role]["loss"] for role in ("teacher", "control", "student")}
    assert same == {"teacher": True, "control": False, "student": False}


def test_the_teacher_stays_as_it_was_while_it_teaches(tiny, monkeypatch):
    digests: list[str] = []
    watch_teacher(monkeypatch, lambda teacher: digests.append(models.digest(teacher.classifier.model)))
    train.main(dataclasses.replace(tiny, kernels="off"))        # with kernels, a folded copy teaches
    assert len(digests) == 2 * 10 and len(set(digests)) == 1  # weights and BatchNorm statistics, to the bit
    saved = models.create("teacher", tiny.teacher, ("blob", "plain", "stripes"), str(Path(tiny.out) / "teacher"))
    assert models.digest(saved) == digests[0]


def test_a_teacher_at_chance_is_refused_until_one_insists_and_its_fine_tuning_is_kept(tiny, capsys):
    config = dataclasses.replace(tiny, teacher_lr=1e-9, allow_weak_teacher=False)
    with pytest.raises(BadInput, match="did you mean test_resnet"):
        train.main(dataclasses.replace(config, teacher="test_resnett"))
    with pytest.raises(BadInput, match=r"near chance .*: its soft targets would be noise; .*--resume --allow-weak"):
        train.main(config)  # the run that failed before has left nothing in the way
    teacher = digests(Path(config.out) / "teacher")
    capsys.readouterr()
    weak = train.main(dataclasses.replace(config, allow_weak_teacher=True, resume=True))
    assert weak["student"]["test_total"] == 12 and "teacher 1/1" not in capsys.readouterr().out
    assert digests(Path(config.out) / "teacher")["model.safetensors"] == teacher["model.safetensors"]
    card = (Path(config.out) / "student" / "README.md").read_text()
    assert "--allow-weak-teacher" in card and "--resume" not in card    # the command makes the run again


# ---- --overwrite -------------------------------------------------------------------------------------------------

def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its path."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(trained, tmp_path) -> train.Config:
    """A finished run that a test may spoil, to be started with --overwrite."""
    config, _ = trained
    shutil.copytree(config.out, tmp_path / "run")
    return dataclasses.replace(config, out=str(tmp_path / "run"), overwrite=True)


@pytest.mark.parametrize("mistake", [
    {"dataset": "RUN/phtos"}, {"student": "resnett50"}, {"teacher_weights": "RUN/no.safetensors"},
    {"teacher_weights": "RUN/notes.txt"}, {"teacher_weights": "RUN/weights.safetensors"},
    {"teacher_weights": "RUN/student/model.safetensors"}], ids=str)
def test_a_mistake_beside_overwrite_costs_nothing(finished, mistake):
    out = Path(finished.out)
    (out / "notes.txt").write_text("mine")
    safetensors.torch.save_file({"other": torch.zeros(2)}, out / "weights.safetensors")
    before = digests(out)
    mistake = {name: value.replace("RUN", str(out)) if isinstance(value, str) else value
               for name, value in mistake.items()}
    with pytest.raises(BadInput):
        train.main(dataclasses.replace(finished, **mistake))
    assert digests(out) == before


def test_overwrite_begins_anew(finished, trained):
    out = Path(finished.out)
    (out / "result.json").write_text('{"of the old run": true}')
    (out / "last.ckpt").write_bytes(b"damaged")
    result = train.main(dataclasses.replace(finished, seed=7, epochs=1))
    assert result["config"]["seed"] == 7 and json.loads((out / "result.json").read_text()) == json.loads(
        json.dumps(result))
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["role"] for entry in history] == ["teacher", "student"]
    assert result["student"] != trained[1]["student"]


def test_a_run_on_a_table_learns_the_column_that_the_flags_name(tiny, tmp_path):
    tables = toy.table(tmp_path / "tables", {"label": "class:2", "fine": "class:3"}, image="photo")
    config = dataclasses.replace(tiny, dataset=str(tables), image="photo", label="fine", epochs=1)
    result = train.main(config)
    assert result["student"]["test_total"] == 24
    saved = models.open_saved(f"{config.out}/student", runtime.start("cpu", "off", "off"))
    assert saved.classes == ("fine0", "fine1", "fine2")


def test_kernels_that_are_insisted_on_and_cannot_be_had_are_refused_with_the_reason(tiny, monkeypatch):
    monkeypatch.setattr(train.blocks, "kernels_missing", lambda device: f"no compiler for {device}: g++ not found")
    with pytest.raises(BadInput, match="^--kernels on: no compiler for cpu: g.. not found; use"):
        train.main(dataclasses.replace(tiny, kernels="on"))
    assert not Path(tiny.out).exists()


def test_a_notebook_keeps_its_signal_handlers_and_a_web_app_its_threads(tiny):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(BadInput):
        train.main(dataclasses.replace(tiny, dataset="nowhere/at/all"))
    with concurrent.futures.ThreadPoolExecutor() as threads:
        result = threads.submit(train.main, dataclasses.replace(tiny, epochs=1)).result()
    assert result["student"]["test_total"] == 12
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_loss_that_is_not_finite_stops_at_its_step_and_leaves_no_nan(tiny):
    with pytest.raises(TrainingFault, match="student: the loss or its gradient is not finite at step "):
        train.main(dataclasses.replace(tiny, lr=1e30, epochs=3))
    out = Path(tiny.out)
    for path in (out / "last.ckpt", out / "last.ckpt.previous"):
        if path.exists():
            for value in checkpoint.read(path)["model"].values():
                assert value.isfinite().all()


class CountScalars(TorchDispatchMode):
    """Counts every read of a tensor's value by the host: .item(), float(), bool(), tolist()."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            CountScalars.reads += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["cold", "warm"])
def test_the_host_waits_for_the_device_only_where_it_logs(tiny, kind):
    config = dataclasses.replace(tiny, epochs=1)
    if kind == "warm":
        train.main(config)
    counts = []
    for batch_size in (21, 7):  # two steps, and six: what differs is what a step costs
        CountScalars.reads = 0
        with CountScalars():
            train.main(dataclasses.replace(config, batch_size=batch_size, out=f"{config.out}-{batch_size}"))
        counts.append(CountScalars.reads)
    assert counts[0] == counts[1] > 0


def test_the_last_line_of_the_process_is_the_result_and_a_finished_run_has_nothing_to_do(tiny, tmp_path, capsys):
    stdout, stderr = tmp_path / "stdout", tmp_path / "stderr"
    assert processes.run(command_line(tiny), stdout, stderr) == 0, stderr.read_text()
    result = json.loads(stdout.read_text().splitlines()[-1])
    assert result == json.loads((Path(tiny.out) / "result.json").read_text())
    assert train.main(dataclasses.replace(tiny, resume=True)) == result
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(BadInput, match="holds another run"):
        train.main(tiny)


def test_a_killed_run_ends_as_if_it_had_not_been(tiny):
    config = dataclasses.replace(tiny, epochs=12, augment="crop", views=3, save_minutes=0.0)  # save at every step
    whole = dataclasses.replace(config, out=config.out + "-whole", cache_dir=config.cache_dir + "-whole")
    train.main(whole)
    out = Path(config.out)
    log = out.with_name("log")
    # somewhere after that many epochs
    for epochs, number, status in ((2, signal.SIGKILL, -9), (5, signal.SIGTERM, 143), (8, signal.SIGINT, 130)):
        process = processes.start(command_line(config, "--resume"), log)
        metrics = out / "metrics.jsonl"
        processes.wait_until(process, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= epochs)
        assert process.pid
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == status, log.read_text()
    assert processes.run(command_line(config, "--resume"), log) == 0, log.read_text()
    ours, theirs = (checkpoint.read(Path(c.out) / "last.ckpt") for c in (config, whole))
    identical(ours, theirs)
    results = [json.loads((Path(c.out) / "result.json").read_text()) for c in (config, whole)]
    identical(results[0]["student"], results[1]["student"])
    identical(results[0]["teacher"], results[1]["teacher"])


def test_the_default_pair_takes_real_steps_on_real_photographs(beans, tmp_path):
    table = train.open_dataset(beans)
    assert table.classes == ("angular_leaf_spot", "bean_rust", "healthy")
    assert [len(table.splits[name]) for name in ("train", "validation", "test")] == [1034, 133, 128]
    two = table.splits["train"][[0, 500]]       # two only: a real run decodes the whole set
    torch.manual_seed(0)
    student = models.create("student", "mobilenetv2_100", table.classes).to(memory_format=torch.channels_last)
    teacher = models.freeze(models.create("teacher", "resnet50", table.classes))
    prep = models.preprocessing(student)
    encoded = [table.read(int(row)) for row in two]
    pictures = [to_frame(open_picture(one, "photograph"), 224, 256, prep.interpolation)
                for one in encoded if isinstance(one, bytes)]
    x = torch.from_numpy(center_crop(np.stack(pictures), 224)).permute(0, 3, 1, 2)
    with torch.no_grad():
        soft = models.FromPixels(teacher, prep)(x)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    before = models.digest(student)
    labels = torch.from_numpy(table.labels[two])
    values = [step(models.FromPixels(student, prep), optimizer, x, labels, soft)[0].item() for _ in range(2)]
    assert all(map(math.isfinite, values)) and models.digest(student) != before
