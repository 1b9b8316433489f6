"""The log of a run: the same epochs in metrics.jsonl and TensorBoard, also after a resume."""

import json
import shutil
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd.machine.records import Records

HISTORY = [{"role": "student", "epoch": epoch, "time": epoch / 2, "accuracy": 1 / epoch} for epoch in (1, 2, 4)]


def test_metrics_and_events_are_those_of_the_history_also_where_another_process_goes_on(tmp_path):
    records = Records(tmp_path)
    records.write(HISTORY[:1])
    records.write(HISTORY[:2])
    shutil.rmtree(records.board)        # by a user
    records.write(HISTORY[:2])
    Records(tmp_path).write(HISTORY)
    assert [json.loads(line) for line in records.path.read_text().splitlines()] == HISTORY
    events = EventAccumulator(str(records.board)).Reload().Scalars("student/accuracy")
    assert [(event.wall_time, event.step, event.value) for event in events] == [(0.5, 1, 1), (1, 2, 0.5), (2, 4, 0.25)]
    assert len(list(records.board.iterdir())) == 1


def test_without_tensorboard_a_line_says_so_and_the_log_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    records = Records(tmp_path)
    for count in (1, 2):
        records.write(HISTORY[:count])
        assert len(records.path.read_text().splitlines()) == count
    assert capsys.readouterr().out.startswith("no more TensorBoard events: import of ") and not records.board.exists()
