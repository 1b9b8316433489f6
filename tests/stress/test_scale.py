"""`python -m tests.stress.scale` in small: what it counts is counted rightly."""

import json

import numpy as np

from tests.stress import scale


def test_every_sample_is_asked_for_once_and_memory_and_rate_are_told(capsys):
    made = scale.main(["--samples", "800", "--classes", "20"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == made
    assert made["samples"] == 800 and made["each_sample_asked_once"]
    corrections = np.divide(made["uncorrected"], made["last_tenth_over_first"])
    assert len(corrections) == 2 and (0.2 < corrections).all() and (corrections < 5).all()
    assert 0.1 < made["peak_gib"] < 4 and min(made["last_tenth_over_first"]) > 0
    # frames of 36 × 36 × 3 bytes; rows of 20 float32 of train, validation and test: what is kept, and little besides
    frames, rows = 840 * 36 * 36 * 3 / 1e6, 840 * 20 * 4 / 1e6
    assert frames + rows < made["cache_mb"] < 1.1 * (frames + rows)
