"""The launcher of the ranks,
and what it makes of signals: found in the environment and in /proc.

Measured with the launchers themselves (``tests/training/test_launchers.py``) and read in
their sources:

- torchrun (torch 2.13 ``distributed/run.py``, ``elastic/multiprocessing/api.py``): passes on the
  signals of ``--signals-to-handle``, kills the ranks ``--shutdown-timeout`` seconds after one (30),
  is ended by any other, and exits with 1. ``accelerate launch`` (1.15) is the same process
- deepspeed (0.19.8 ``launcher/launch.py: terminate_process_tree``, ``runner.py``): two processes;
  the outer one passes nothing on and just ends, the inner one passes on SIGTERM and SIGINT as
  SIGTERM and kills the ranks after 30 s
- srun passes on what it is sent, and Slurm signals all tasks itself
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HANDLED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"  # of torchrun, without --signals-to-handle
SECONDS = 30.0  # from a signal to SIGKILL: torchrun's default, and deepspeed's constant
ALWAYS = ("SIGTERM", "SIGUSR1")  # what schedulers send
ON_REQUEST = ("SIGUSR2", "SIGHUP")  # heeded where the launcher was told to pass them on
ELASTIC = ("torchrun", "torch.distributed.run", "torch.distributed.launch")


@dataclass(frozen=True, slots=True)
class LauncherProcess:
    """A process above this one. ``began`` tells it from a later one of the same number."""

    pid: int
    arguments: tuple[str, ...]
    began: str = ""

    def alive(self) -> bool:
        """Whether the process still runs;
        one that has ended and was not waited for does not."""
        state = _state(self.pid)
        return state is not None and state.began == self.began and state.letter not in "ZX"

    def runs(self, *programs: str) -> bool:
        """Whether the process is one of these programs or modules."""
        first_words = self.arguments[:6]
        return any(
            program in (word, os.path.basename(word))
            for word in first_words
            for program in programs
        )


@dataclass(frozen=True, slots=True)
class Launcher:
    """A launcher of the ranks of a node.
    ``name`` is empty where nothing known starts them.

    ``passes``: the signals that reach the ranks through it. ``grace``: seconds from
    such a signal until it kills the ranks, ``None`` if it does not. ``processes``:
    those of it on this node, the nearest first. ``restarts``: how often it will start
    the ranks again. ``slurm``: in a job of it.
    """

    name: str = ""
    passes: tuple[str, ...] = ()
    grace: float | None = None
    processes: tuple[LauncherProcess, ...] = ()
    restarts: int = 0
    slurm: bool = False

    @property
    def elastic(self) -> bool:
        """Whether the launcher is torchrun, under whichever name."""
        return self.name in ("torchrun", "accelerate launch") and bool(self.passes)

    def handled_signals(self) -> tuple[str, ...]:
        """The signals that ask a training to stop, unless the user names others."""
        requested_signals = tuple(
            signal for signal in ON_REQUEST if self._is_passed_on_request(signal)
        )
        return (*ALWAYS, *requested_signals)

    def _is_passed_on_request(self, signal: str) -> bool:
        is_passed = self.elastic and signal in self.passes

        return is_passed and signal not in HANDLED.split(",")

    def ended(self) -> LauncherProcess | None:
        """A process of the launcher that has ended;
        then nobody waits for the ranks any more."""
        return next((process for process in self.processes if not process.alive()), None)

    def remedy(self) -> str:
        """How to start the launcher so that the signals reach the ranks."""
        all_signals = [*HANDLED.split(","), *self.passes, "SIGUSR1"]
        signal_names = ",".join(dict.fromkeys(all_signals))
        if self.name == "torchrun":
            return f"start it with --signals-to-handle {signal_names}"
        return f"start it with PET_SIGNALS_TO_HANDLE={signal_names} in its environment"

    def more_time(self) -> str:
        """How to start the launcher so that it waits longer, as the end of a sentence."""
        if self.name == "torchrun":
            return "; torchrun --shutdown-timeout 300 gives more time"
        return "; PET_SHUTDOWN_TIMEOUT=300 in the environment gives more time" * self.elastic

    def announcement(self, signals: Sequence[str]) -> tuple[str, bool]:
        """A line on what the launcher will do,
        and whether something in it needs the user."""
        fatal_signals = [signal for signal in signals if signal not in self.passes]
        if self.elastic:
            grace = f"{self.grace:g} s" if self.grace is not None else "some time"
            description = (
                f"{self.name} passes on {', '.join(self.passes)}, kills the ranks "
                f"{grace} later (--shutdown-timeout), and exits with 1 whatever the "
                "ranks exit with"
            )
            if fatal_signals:
                description += (
                    f"; {' and '.join(fatal_signals)} ends {self.name} itself: {self.remedy()}"
                )

            return description, bool(fatal_signals) and self.slurm

        if self.name == "deepspeed":
            return (
                "deepspeed passes no signal on when it is signalled itself: the ranks "
                "notice that it has ended, and save; its inner process kills them "
                f"{SECONDS:g} s after SIGTERM"
            ), False

        if self.name == "accelerate launch":
            return (
                "accelerate launch passes no signal on: the rank notices that it has "
                "ended, and saves; the exit code is 1, or that of the signal"
            ), False

        if self.name == "srun":
            return (
                "srun passes signals on and exits with the ranks' code; Slurm kills "
                "KillWait seconds (30 by default) after SIGTERM: ask for a warning, "
                "--signal=USR1@120"
            ), False

        return "", False


@dataclass(frozen=True, slots=True)
class _State:
    letter: str
    parent: int
    began: str


def _state(pid: int) -> _State | None:
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return None

    fields = stat_line.rpartition(")")[2].split()  # the name before it may hold anything
    return _State(fields[0], int(fields[1]), fields[19])


def ancestors() -> list[LauncherProcess]:
    """The processes above this one, the nearest first; none where there is no /proc."""
    processes: list[LauncherProcess] = []
    state = _state(os.getpid())
    while state is not None and state.parent > 0 and len(processes) < 32:
        parent_pid = state.parent
        state = _state(parent_pid)
        if state is not None:
            processes.append(LauncherProcess(parent_pid, _arguments(parent_pid), state.began))

    return processes


def _arguments(pid: int) -> tuple[str, ...]:
    try:
        command_line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()

    words = command_line.split(b"\0")[:-1]  # each ends in a zero byte

    return tuple(word.decode(errors="replace") for word in words)


_detected: Launcher | None = None


def detect() -> Launcher:
    """The launcher of this process, as it was when it was first asked for."""
    global _detected
    if _detected is None:
        _detected = launcher_of(os.environ, ancestors())
    return _detected


def launcher_of(
    environment: Mapping[str, str],
    ancestry: Sequence[LauncherProcess],
) -> Launcher:
    """The launcher that these processes and variables tell of."""
    slurm = "SLURM_JOB_ID" in environment
    accelerate = next((process for process in ancestry if _is_accelerate(process)), None)
    if "TORCHELASTIC_RUN_ID" in environment:
        agent = accelerate or next(
            (process for process in ancestry if process.runs(*ELASTIC)), None
        )
        signal_list = environment.get("TORCHELASTIC_SIGNALS_TO_HANDLE", HANDLED)
        passes = tuple(name.strip() for name in signal_list.split(","))
        remaining_restarts = _number(environment.get("TORCHELASTIC_MAX_RESTARTS"), 0.0)
        remaining_restarts -= _number(environment.get("TORCHELASTIC_RESTART_COUNT"), 0.0)

        return Launcher(
            "accelerate launch" if accelerate else "torchrun",
            passes,
            _grace(environment, agent),
            (agent,) if agent else (),
            max(0, int(remaining_restarts)),
            slurm,
        )

    inner = next(
        (process for process in ancestry if process.runs("deepspeed.launcher.launch")), None
    )
    if inner is not None:
        outer = next(
            (process for process in ancestry if process.runs("deepspeed", "deepspeed.pt", "ds")),
            None,
        )
        processes = (inner, outer) if outer else (inner,)
        return Launcher("deepspeed", ("SIGTERM",), SECONDS, processes, slurm=slurm)

    if accelerate is not None:
        return Launcher("accelerate launch", processes=(accelerate,), slurm=slurm)
    if "SLURM_STEP_ID" in environment:
        return Launcher("srun", (*ALWAYS, *ON_REQUEST), slurm=slurm)

    return Launcher(slurm=slurm)


def _is_accelerate(process: LauncherProcess) -> bool:
    if process.runs("accelerate-launch", "accelerate.commands.launch"):
        return True
    return process.runs("accelerate") and "launch" in process.arguments[:6]


def _grace(environment: Mapping[str, str], agent: LauncherProcess | None) -> float:
    """Seconds between torchrun's signal and SIGKILL: option, its variables,
    or the default."""
    arguments = agent.arguments if agent else ()
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("--shutdown-timeout", "--shutdown_timeout"):
            return _number(
                value if equals else "".join(arguments[index + 1 : index + 2]),
                SECONDS,
            )

    for variable in ("PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        if variable in environment:
            return _number(environment[variable], SECONDS)

    return SECONDS


def _number(number_text: str | None, default: float) -> float:
    try:
        return float(number_text or "")
    except ValueError:
        return default
