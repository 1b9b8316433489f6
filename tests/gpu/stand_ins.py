"""Stand-ins for what is for people, and that no number depends on: TensorBoard's log and the page of a run.

A machine with a GPU may lack the libraries that they need. Without them, `train.main` still trains.
"""

import importlib.util
import sys
from types import ModuleType
from unittest.mock import MagicMock


def missing(library: str) -> bool:
    """Whether it cannot be imported here."""
    return importlib.util.find_spec(library) is None


def install(draw: bool = True) -> None:
    """Put them in the place of what is missing. Call it before the first import of `train`.

    draw: whether a page is drawn where it can be. Its plots take longer than the rest of a tiny run.
    """
    if missing("tensorboard"):
        for name in ("tensorboard", "tensorboard.compat", "tensorboard.compat.proto", "tensorboard.summary",
                     "tensorboard.compat.proto.event_pb2", "tensorboard.compat.proto.summary_pb2",
                     "tensorboard.summary.writer", "tensorboard.summary.writer.record_writer"):
            sys.modules[name] = MagicMock()
    if not draw or missing("matplotlib") or missing("jinja2"):
        page = ModuleType("kd.tools.page")
        page.write_report = lambda *arguments: "not drawn"  # type: ignore[attr-defined]
        sys.modules["kd.tools.page"] = page
