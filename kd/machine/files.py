"""Files: written whole or not at all, and mapped into memory without filling it."""

import errno
import hashlib
import mmap
import os
import shutil
import threading
from io import BufferedIOBase
from pathlib import Path
from types import ModuleType

import numpy as np

from kd import DISK_FULL, TrainingFault
from kd.machine import distributed

RESIDENT = 64 << 20     # bytes of mapped files that may stay in a process's memory


def code_digest(*modules: ModuleType) -> str:
    """A hash of the source of these modules: what is stored is valid only for the code that made it."""
    return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make new and renamed names in `folder` durable, where the system can.

    Windows opens no folder (EACCES), and some network disks have no such call (EINVAL).
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL):
            raise


def sync_file(path: Path) -> None:
    """Make the content of a file durable that another library has written."""
    with open(path, "r+b") as file:     # Windows flushes only what is open for writing
        os.fsync(file.fileno())


_place_of_writing = threading.Lock()    # a descriptor has one place, which belongs to all threads


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of an open file. Several threads may do so at once."""
    data = memoryview(data).cast("B")
    if hasattr(os, "pwrite"):
        while data:         # a single call may write only a part
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
        return

    with _place_of_writing:     # Windows
        os.lseek(descriptor, offset, os.SEEK_SET)
        while data:
            data = data[os.write(descriptor, data):]


def write_atomic(path: Path, content: bytes, keep_previous: bool = False) -> None:
    """Replace `path` by `content`; a reader, or a crash, meets either the old file or the new one.

    keep_previous: the old file stays as `NAME.previous`, and the new one is read back before it
    takes its place.

    Raises TrainingFault where the disk is full or not writable. The old file is then untouched, and
    no temporary file is left. Of several ranks only the first writes.
    """
    if distributed.rank():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

        if keep_previous:
            if temporary.read_bytes() != content:
                raise OSError(errno.EIO, "the disk gives back something else than was written")
            if path.exists():
                _keep_as_previous(path)

        os.replace(temporary, path)
        sync_folder(path.parent)    # only then does the rename survive a power failure
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TrainingFault(f"cannot write {path}: {error.strerror or error}; free some space or give another --out, "
                            f"then --resume") from error


def _keep_as_previous(path: Path) -> None:
    """Give the file at `path` a second name, `NAME.previous`, so that `path` itself is never absent."""
    previous = path.with_name(path.name + ".previous")
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        shutil.copyfile(path, previous)     # the file system has no hard links


class MappedFiles:
    """Files mapped read-only into memory, of which a process keeps at most about 64 MB resident.

    Otherwise every page that it has read counts as its memory, and a limit on that may end it.
    """

    def __init__(self) -> None:
        self._mappings: list[mmap.mmap] = []
        self._read = 0      # bytes since the mappings were last released

    def open(self, file: BufferedIOBase, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """The beginning of an open file as a read-only array. The file may be closed afterwards."""
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._mappings.append(mapping)
        return np.frombuffer(mapping, dtype, count=int(np.prod(shape))).reshape(shape)

    def count(self, nbytes: int) -> None:
        """To be called after every read of an array, with its size."""
        self._read += nbytes
        if self._read > RESIDENT:
            if hasattr(mmap, "MADV_DONTNEED"):      # not on Windows, which takes back what it needs by itself
                for mapping in self._mappings:
                    mapping.madvise(mmap.MADV_DONTNEED)     # the pages stay in the kernel's page cache
            self._read = 0
