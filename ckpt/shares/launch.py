"""Whether a command was started as one of several processes: by what their launcher says.

    torchrun               RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    Kubeflow's PyTorchJob  the same, in each pod
    srun                   SLURM_PROCID, SLURM_STEP_NUM_TASKS; the address from the list of nodes
    an indexed Job         JOB_COMPLETION_INDEX; WORLD_SIZE and MASTER_ADDR from its manifest

Variables are inherited, so they say nothing alone: a script of a training that calls
``ckpt`` has them too, and so has a shell inside of an allocation. A command counts as
started by the launcher itself where no Python program stands between them, and in a pod
where nobody types at a terminal; in a shell of sbatch or salloc Slurm counts one task
(``SLURM_STEP_NUM_TASKS``, which is that of the step, where ``SLURM_NTASKS`` is what the
job asked for).

Variables of torchrun: torch 2.13 ``distributed/elastic/agent/server/local_elastic_agent.py``;
of Slurm: the manual page of srun; of Kubernetes: the documentation of Indexed Jobs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from converters.errors import CheckpointError

PORT = 29500  # torch's default
SLURM_PORTS = range(20_000, 30_000)
LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
_FIRST_HOST = r"([^\[,]+)(?:\[(\d+)[^\]]*\])?"


class AncestorProcess(Protocol):
    """A process above this one, as ``ckpt.distributed.launchers`` has it."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Its command line."""

    def runs(self, *programs: str) -> bool:
        """Whether it is one of these programs or modules."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One process of several: its number from 0 on, and where the first of them is reached.

    ``attempt`` is how often the launcher has started them again; ``has_store`` whether
    the launcher itself holds a store at that address.
    """

    launcher: str
    rank: int
    count: int
    address: str
    port: int
    attempt: int = 0
    has_store: bool = False


def launch_of(
    environment: Mapping[str, str],
    ancestry: Sequence[AncestorProcess],
    is_interactive: bool = False,
) -> Launch | None:
    """The launch that these variables and processes tell of; ``None`` for a process alone.

    ``is_interactive`` is whether somebody types at a terminal, such as in a shell that
    was opened in a pod. ``CheckpointError`` where it is one of several that cannot find
    each other.
    """
    if _is_nested(ancestry):
        return None

    rank, count = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" in environment:
        attempt = _number(environment, "TORCHELASTIC_RESTART_COUNT") or 0
        has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return _launch("torchrun", rank, count, environment, attempt, has_store)

    task_count = _number(environment, "SLURM_STEP_NUM_TASKS") or 1
    if task_count > 1:
        return _launch("srun", _number(environment, "SLURM_PROCID"), task_count, environment)
    if is_interactive:
        return None
    if rank is not None and "MASTER_ADDR" in environment:
        return _launch("the launcher", rank, count, environment)

    index = _number(environment, "JOB_COMPLETION_INDEX")
    return _launch("the indexed Job", index, count, environment)


def _launch(
    launcher: str,
    rank: int | None,
    count: int | None,
    environment: Mapping[str, str],
    attempt: int = 0,
    has_store: bool = False,
) -> Launch | None:
    if rank is None or count is None or count < 2:
        return None
    if not 0 <= rank < count:
        raise CheckpointError(
            f"{launcher} says that this is process {rank} of {count}, counted from 0 on; set "
            "WORLD_SIZE to the number of processes",
            "refused",
        )

    address = environment.get("MASTER_ADDR") or _first_host(environment)
    if address is None:
        raise CheckpointError(
            f"{launcher} started {count} processes and does not say where the first one is; set "
            "MASTER_ADDR to its host in the environment of all of them, or WORLD_SIZE to 1 for "
            "one process that works alone",
            "refused",
        )

    port = _number(environment, "MASTER_PORT") or _port_of_job(environment)
    return Launch(launcher, rank, count, address, port, attempt, has_store)


def _is_nested(ancestry: Sequence[AncestorProcess]) -> bool:
    """Whether a Python program, such as a training, stands between this process and the
    launcher."""
    for process in ancestry:
        if process.runs(*LAUNCHERS):
            return False
        program = os.path.basename(process.arguments[0]) if process.arguments else ""
        if program.startswith(("python", "pypy", "ipython")):
            return True
    return False


def _first_host(environment: Mapping[str, str]) -> str | None:
    """The first node of a step: ``gpu[03-06,9],login`` begins with gpu03."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    match = re.match(_FIRST_HOST, nodes)
    return match[1] + (match[2] or "") if match else None


def _port_of_job(environment: Mapping[str, str]) -> int:
    """A port of its own for each step of Slurm, as several may share a node."""
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    if job is None:
        return PORT
    return SLURM_PORTS[(job * 31 + (step or 0)) % len(SLURM_PORTS)]


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None
