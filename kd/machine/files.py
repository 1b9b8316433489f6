"""Files: written whole or not at all."""

import errno
import hashlib
import os
from pathlib import Path
from types import ModuleType

from kd import TrainingFault
from kd.machine import distributed


def code_digest(*modules: ModuleType) -> str:
    """A hash of the source of these modules: what is stored is valid only for the code that made it."""
    return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()


def sync(path: Path) -> None:
    """Make the content of a file durable, or the names in a folder, where the disk can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:     # some network disks have no such call for folders
            raise
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of an open file. Several threads may do so at once."""
    data = memoryview(data).cast("B")
    while data:         # a single call may write only a part
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def write_atomic(path: Path, *content: bytes | memoryview, keep_previous: bool = False) -> None:
    """Replace `path` by `content`; a reader, or a crash, meets either the old file or the new one.

    keep_previous: the old file stays as `NAME.previous`. A crash may leave that one alone.

    Raises TrainingFault where the disk is full or not writable. The old file is then untouched, and
    no temporary file is left. Of several ranks only the first writes.
    """
    if distributed.rank():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(content)
        sync(temporary)
        if keep_previous and path.exists():
            path.replace(path.with_name(path.name + ".previous"))
        temporary.replace(path)
        sync(path.parent)       # only then does the rename survive a power failure
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TrainingFault(f"cannot write {path}: {error.strerror or error}; free some space or give another --out, "
                            f"then --resume") from error
