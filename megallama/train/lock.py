"""One live start to a run folder."""

import fcntl
import os
import socket
import time
from pathlib import Path

from megallama.config.errors import UserError

DYING_S = 10.0
"""How long a start that was killed may take to let go."""


def lock_folder(run: Path) -> None:
    """Hold the folder until this process ends.

    Some network file systems do not honour such locks; there, nothing is held.

    Raises:
        UserError: another process holds it.

    """
    path = run / ".lock"
    # Never closed: the kernel releases the lock when this process ends, however it does.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + DYING_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = path.read_text().strip() or "another process"
                raise UserError.one(
                    "run", f"{str(run)!r} is in use by {holder}: wait for it, or name another"
                ) from None
            time.sleep(0.1)
        except OSError:
            return
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{socket.gethostname()}, process {os.getpid()}".encode())
