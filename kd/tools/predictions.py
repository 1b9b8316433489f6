"""predictions.npz: the test logits of a run and the pictures of its page, enough to study a run without its data.

The file is an archive of plain arrays under the names of the fields below, each role's logits under the role. It is
read with allow_pickle=False, so that nothing in it can run.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd import BadInput

FILE = "predictions.npz"
ROLES = ("teacher", "control", "student")


@dataclass(frozen=True)
class Predictions:
    """N test samples of C classes, S pictures of test samples, and V views of each of M training samples."""

    classes: list[str]              # C
    labels: np.ndarray              # (N,) int64
    names: list[str]                # N, such as the samples' files
    logits: dict[str, np.ndarray]   # by role, (N, C) float32
    shown: np.ndarray               # (S,) int64, the numbers of the test samples in `pictures`
    pictures: np.ndarray            # (S, P, P, 3) uint8
    views: np.ndarray               # (M, V, size, size, 3) uint8
    view_labels: np.ndarray         # (M,) int64

    def correct(self, role: str) -> np.ndarray:
        """Whether this model predicts the true class, bool `(N,)`."""
        return self.logits[role].argmax(axis=1) == self.labels

    def to_bytes(self) -> bytes:
        """The content of the file."""
        arrays = {"classes": np.array(self.classes, np.str_), "names": np.array(self.names, np.str_),
                  **{name: getattr(self, name) for name in ("labels", "shown", "pictures", "views", "view_labels")},
                  **{role: values.astype(np.float32) for role, values in self.logits.items()}}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()


def read_predictions(path: Path) -> Predictions:
    """Raises BadInput where the file is absent, damaged or something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        logits = {role: arrays.pop(role) for role in ROLES if role in arrays}
        return Predictions(arrays.pop("classes").tolist(), names=arrays.pop("names").tolist(), logits=logits, **arrays)
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; a run writes it when it ends, and --resume ends it") from error
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise BadInput(f"{path}: not readable ({error}); remove it and report.html, then --resume the run"
                       ) from error
