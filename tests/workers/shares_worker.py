"""``ckpt`` as one of the processes of a launcher: ``shares_worker.py COMMAND...``.

SAYS=PATH: all append what they print on stdout to that file.
DIES=1/kill: rank 1 is killed as it begins its share. DIES=1/error: it finds its disk full there.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

from ckpt.cli.main import main
from ckpt.distributed import launchers
from ckpt.shares import company, moving


def write_share(*_arguments: Any, **_options: Any) -> None:
    """What the process does that is to die."""
    if os.environ["DIES"].endswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the-disk")


if __name__ == "__main__":
    launchers.ancestors = list  # a fork of a Python program is not nested in one
    company.SILENCE = 2.0
    if os.environ.get("DIES", "").startswith(f"{os.environ['RANK']}/"):
        moving.write_share = write_share  # type: ignore[assignment]
    if "SAYS" in os.environ:
        os.dup2(os.open(os.environ["SAYS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    main(sys.argv[1:])
