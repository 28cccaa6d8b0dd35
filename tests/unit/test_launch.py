"""Which of several processes a command is, by the variables of launchers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from ckpt.distributed.launchers import LauncherProcess
from ckpt.shares.launch import Launch, launch_of
from converters.errors import CheckpointError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "3",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29511",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[03-06,9],login",
}
INDEXED = {"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "convert-0.convert"}


def process(*arguments: str) -> LauncherProcess:
    return LauncherProcess(1, arguments)


SHELL = process("/bin/bash", "-c", "ckpt to-fp32 out")
AGENT = process("/usr/bin/python3", "/usr/bin/torchrun", "-m", "ckpt", "to-fp32")
SLURMSTEPD = process("slurmstepd: [1234.2]")
TRAINING = process("/usr/bin/python3.11", "train.py")


@pytest.mark.parametrize("ancestry", [[AGENT], [SHELL, AGENT, TRAINING], []])
def test_torchrun_says_it_all(ancestry: list[LauncherProcess]) -> None:
    assert launch_of(TORCHRUN, ancestry) == Launch("torchrun", 3, 8, "node7", 29511, 1, True)


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN, INDEXED])
def test_what_a_training_calls_works_alone(environment: Mapping[str, str]) -> None:
    assert launch_of(environment, [TRAINING, AGENT]) is None
    assert launch_of(environment, [SHELL, TRAINING, SLURMSTEPD]) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[03-06,9],login", "gpu03"),
        ("login,gpu[1-2]", "login"),
        ("node-a", "node-a"),
        ("n[1,3]", "n1"),
    ],
)
def test_srun_names_the_first_node_and_each_step_has_a_port(nodes: str, host: str) -> None:
    step = launch_of(SRUN | {"SLURM_STEP_NODELIST": nodes}, [SHELL, SLURMSTEPD])
    later_step = launch_of(SRUN | {"SLURM_STEP_ID": "3"}, [SLURMSTEPD])
    assert step is not None and later_step is not None
    assert (step.launcher, step.rank, step.count, step.address) == ("srun", 3, 8, host)
    assert not step.has_store and 20_000 <= step.port < 30_000
    assert later_step.port != step.port


def test_a_shell_of_sbatch_or_salloc_has_one_task_whatever_the_job_has() -> None:
    batch = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert launch_of(batch, [SHELL, SLURMSTEPD]) is None
    del batch["SLURM_STEP_NUM_TASKS"]
    assert launch_of(batch, [SHELL, SLURMSTEPD]) is None


def test_an_indexed_job_is_told_how_many_there_are() -> None:
    launch = launch_of(INDEXED, [])
    assert launch == Launch("the indexed Job", 3, 8, "convert-0.convert", 29500)
    assert launch_of({"JOB_COMPLETION_INDEX": "3"}, []) is None
    with pytest.raises(CheckpointError, match="set MASTER_ADDR"):
        launch_of({"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "8"}, [])
    with pytest.raises(CheckpointError, match="process 9 of 8"):
        launch_of(INDEXED | {"JOB_COMPLETION_INDEX": "9"}, [])


def test_other_launchers_of_torch_are_heeded_and_one_process_is_alone() -> None:
    pod = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "master"}
    assert launch_of(pod, []) == Launch("the launcher", 0, 2, "master", 29500)
    assert launch_of(pod, [SHELL], is_interactive=True) is None  # kubectl exec -it
    for one in (pod | {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}, {}):
        assert launch_of(one, []) is None
