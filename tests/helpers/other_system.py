"""train.py on a system that has only what Windows and macOS have as well, as far as Linux can play it.

    python -X warn_default_encoding tests/helpers/other_system.py FLAGS [-- FLAGS ...]

It runs train.py once for each group of flags, in this process. What is hidden from every module: os.pwrite,
os.sched_getaffinity, os.posix_fallocate, mmap.madvise. What only the project's own modules meet: modules that only Unix
has, folders that cannot be opened, files that cannot be flushed unless they are open for writing, files in use that
cannot be renamed or removed, and an error for text in the system's encoding.
"""

import builtins
import errno
import fcntl
import mmap
import os
import runpy
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parents[2]
OURS = ("kd", "train", "__main__")
LIBRARIES = ("pathlib", "shutil", "tempfile", "contextlib", "functools")


def called_by_us() -> bool:
    """Whether the nearest caller outside of this file and of Python's own modules for files is the project's."""
    frame: Any = sys._getframe(1)
    while frame and (frame.f_code.co_filename == __file__ or frame.f_globals.get("__name__") in LIBRARIES):
        frame = frame.f_back
    return bool(frame) and frame.f_globals.get("__name__", "").split(".")[0] in OURS


def in_use(path: Any) -> bool:
    """Whether this process has a file open or mapped that is `path` or lies below it."""
    real = os.path.realpath(path)
    mapped = [line.split(maxsplit=5)[5].strip() for line in Path("/proc/self/maps").read_text("utf-8").splitlines()
              if "/" in line]
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return any(each == real or each.startswith(real + "/") for each in mapped + opened)


def hide() -> None:
    for name in ("pwrite", "pread", "sched_getaffinity", "posix_fallocate"):
        delattr(os, name)
    for name in [name for name in vars(mmap) if name.startswith("MADV_")]:
        delattr(mmap, name)

    class Mapping(mmap.mmap):
        @property
        def madvise(self) -> Any:       # type: ignore[override]
            raise AttributeError("madvise")

    mmap.mmap = Mapping                 # type: ignore[misc]
    shutil._use_fd_functions = False    # type: ignore[attr-defined]    # rmtree would open folders
    real_import, real_open, real_fsync = builtins.__import__, os.open, os.fsync

    def import_(name: str, *rest: Any, **more: Any) -> Any:
        if name in ("fcntl", "resource", "pwd", "grp", "termios") and called_by_us():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *rest, **more)

    def open_(path: Any, *rest: Any, **more: Any) -> int:
        if called_by_us() and not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real_open(path, *rest, **more)

    def fsync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real_fsync(descriptor)

    def unless_in_use(call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*paths: Any, **more: Any) -> Any:
            if called_by_us():
                for path in paths[:2]:
                    if in_use(path):
                        raise PermissionError(errno.EACCES, "The process cannot access the file", path)
                if call is real_rename and os.path.exists(paths[1]):
                    raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", paths[1])
            return call(*paths, **more)
        return checked

    real_rename = os.rename
    builtins.__import__ = import_       # type: ignore[assignment]
    os.open, os.fsync = open_, fsync    # type: ignore[assignment]
    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        setattr(os, name, unless_in_use(getattr(os, name)))
    # git's answer, which kd/machine/runtime.py reads, is plain ASCII
    warnings.filterwarnings("error", category=EncodingWarning, module=r"(kd|train|__main__)\b(?!\.machine\.runtime)")


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    groups: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "--":
            groups.append([])
        else:
            groups[-1].append(word)
    hide()
    for group in groups:
        sys.argv = ["train.py", *group]
        runpy.run_path("train.py", run_name="__main__")
