"""The end of a worker that has done its work."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist


def leave() -> None:
    """Ends the process with exit code 0, without the destructors of gloo's threads.

    These abort now and then ("terminate called without an active exception"), though all is done.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
