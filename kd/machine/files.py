"""Files that are either whole or absent."""

import errno
import os
import shutil
from pathlib import Path

from kd import TrainingFault
from kd.machine import distributed

# what the system says when there is no room: a full disk, a used-up quota, a file too large, a disk that fails
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def sync_folder(folder: Path) -> None:
    """Make new and renamed names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes, keep_previous: bool = False) -> None:
    """Replace `path` by `content` so that a reader, or a crash at any moment, meets the old file or the new one.

    Raises TrainingFault where the disk is full or not writable; the old file is then untouched and no other is left.
    Of several ranks only the first writes.
    """
    if distributed.rank():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and temporary.read_bytes() != content:  # before the one that it replaces is let go
            raise OSError(errno.EIO, "the disk gives back something else than was written")
        if keep_previous and path.exists():
            previous = path.with_name(path.name + ".previous")
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)  # a second name, so that `path` itself is never absent
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise
                shutil.copyfile(path, previous)  # a file system without hard links
        os.replace(temporary, path)
        sync_folder(path.parent)  # the rename is durable only once the folder is
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TrainingFault(f"cannot write {path}: {error.strerror or error}; free some space or give another --out, "
                            f"then --resume") from error
