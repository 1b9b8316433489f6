"""The log of a run: the same epochs in metrics.jsonl and TensorBoard, also after a resume."""

import json

from kd.machine.records import Records


def test_metrics_are_one_object_an_epoch(tmp_path):
    records = Records(tmp_path)
    history = [{"role": "student", "epoch": 1, "time": 1.0, "accuracy": 0.5}]
    records.write(history)
    history.append({"role": "student", "epoch": 2, "time": 2.0, "accuracy": 0.75})
    records.write(history)
    history.append({"role": "student", "epoch": 3, "time": 3.0, "accuracy": 0.25})
    Records(tmp_path).write(history)  # another process goes on
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == history
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("student/accuracy")] == [
        (1, 0.5), (2, 0.75), (3, 0.25)]
