"""What srun does, as far as a training sees it: ``srun.py -n TASKS COMMAND...``.

Starts the tasks with the variables that Slurm sets, passes SIGTERM, SIGUSR1 and SIGUSR2 on to all
of them, and exits with the highest of their codes, 128 more than the signal for one that a signal
ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

PASSED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(count: int, command: list[str]) -> int:
    tasks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for task in tasks:
            if task.poll() is None:
                task.send_signal(number)

    for number in PASSED:
        signal.signal(number, pass_on)
    for rank in range(count):
        given = {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        given |= {"SLURM_NTASKS": str(count), "SLURM_STEP_NUM_TASKS": str(count)}
        given.setdefault("SLURM_JOB_ID", os.environ.get("SLURM_JOB_ID", "1"))
        tasks.append(subprocess.Popen(command, env=os.environ | given))
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    assert sys.argv[1] == "-n"
    sys.exit(main(int(sys.argv[2]), sys.argv[3:]))
