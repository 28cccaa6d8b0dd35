"""Ranks as forks of one process that has imported torch, DeepSpeed and the trainers: 0.3 s, not 8.

    ended = run("tests/workers/live_worker.py", [out, "cases"], ranks=2, limit=300, environment={})

The warm process has a single thread and has computed nothing, so that its forks are as good as
fresh processes: each sets up gloo, DeepSpeed and its trainer itself, and ends as the interpreter
ends, but that one which ends well frees no modules. What a rank imports on its way, of ckpt too,
the next ones are forked with: that is two thirds of what a short training costs. Workers and
helpers of tests each rank imports itself, as another launch may see others at the same names.

The processes of a test run share the warm process, whichever starts it: each has a connection, and
a launch is a fork, so that launches run beside each other. When it has forked the ranks, it listens
on the port that they meet at, as the agent of torchrun does; the system chooses the port, and
nobody else can take it meanwhile. Ranks see the variables that torchrun sets. The libraries of
tests/support/faults are preloaded, and do nothing until a rank asks for it. Another one gets a warm
process of its own.

What torchrun itself does (signals, restarts, its report of a failure) is not here: those tests
start it (``oracles.torchrun`` with ``fresh``, tests/training/test_launchers.py).
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn
from unittest.mock import patch
from zlib import crc32

from faults import faults, places
from paths import PATHS, PYTHONPATH, ROOT

IMPORTED = (
    "torch.distributed",
    "deepspeed",
    "transformers",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "peft",
    "lightning.pytorch",
    "safetensors.torch",
)
# What most ranks import on their way, if the installed versions have it. Muon's is by every engine.
IMPORTED_LATER = (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "ckpt.live",
    "ckpt.trainers.accelerate",
    "ckpt.trainers.hf",
    "ckpt.trainers.lightning",
)
# Read where a function is decorated, so when Muon is imported: its kernels would be compiled in
# each rank, whatever the environment of a launch says, and the import alone would take torch's
# compiler with it, 1.8 s. What a rank itself compiles is compiled.
NOT_COMPILED = {"TORCHDYNAMO_DISABLE": "1"}
SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PACKAGES = ("ckpt", "converters")  # of this repository, and the same for every rank
THREADED = {"hf_xet", "tensorboard", "wandb"}  # start threads when they are imported
GRACE = 30.0  # seconds from SIGTERM to SIGKILL for ranks whose fellow has failed, as torchrun's
# Seconds until the others get that SIGTERM: torchrun looks at its ranks now and then. A test that
# needs the last words of all ranks sets more by the environment variable of this name.
NOTICE = 0.5
PORT_DIGITS = 6
LINGER = 1.0  # seconds that the warm process is there without anybody who asks
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Ended:
    """How ranks ended: 0, or 1 if any failed, as torchrun has it, and what they wrote on stderr."""

    returncode: int
    stderr: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What the ranks of a launch run, and with which environment; ``limit`` is in seconds.

    Without ``elastic`` there is no store, and the environment is only what it says: a process as
    a user starts it, without a launcher. With ``alone`` each rank is a node of its own, as if one
    torchrun on each of so many machines had started it. Unless it ``shares_imports``, later ones
    are not forked with what its first rank imports.
    """

    script: str
    arguments: list[str]
    ranks: int
    limit: float
    environment: dict[str, str]
    elastic: bool = True
    alone: bool = False
    shares_imports: bool = True


class _WarmProcess:
    """A connection to the warm process, which the first one starts; the others wait for it.

    All processes of a test run share it. It ends with the last connection. That it listens at an
    abstract address shows which is the first: nobody can listen there a second time.
    """

    def __init__(self, preloaded: str) -> None:
        run_id = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"{os.getpid()} {time.monotonic_ns()}")
        address = f"\0ckpt-warm-ranks-{crc32(f'{run_id} {preloaded}'.encode()):08x}"
        with socket.socket(socket.AF_UNIX) as listener:
            if _can_listen(listener, address):
                _start(listener, preloaded)
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(address)
        self.lines = self.connection.makefile("rw")
        self.has_ended = False
        atexit.register(self.close)

    def close(self) -> None:
        self.lines.close()
        self.connection.close()

    def launch(self, launch: Launch) -> Ended:
        with tempfile.TemporaryFile("w+", errors="replace") as messages:
            request = {
                "messages": f"/proc/{os.getpid()}/fd/{messages.fileno()}",
                **{name: getattr(launch, name) for name in Launch.__dataclass_fields__},
            }
            self.lines.write(json.dumps(request) + "\n")
            self.lines.flush()
            answer = self.lines.readline()
            messages.seek(0)
            text = messages.read()
        if not answer:
            self.has_ended = True
            raise RuntimeError(f"the warm process has ended; {text[-3000:]}")
        reply = json.loads(answer)
        if reply["hung"]:
            raise subprocess.TimeoutExpired(launch.script, launch.limit, stderr=text)
        return Ended(reply["code"], text)


def _can_listen(listener: socket.socket, address: str) -> bool:
    """Whether nobody else listened at an address, where this one does now."""
    try:
        listener.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        time.sleep(0.1)  # it may have been bound just now, by one that will listen at once
        return False
    listener.listen(64)
    return True


def _start(listener: socket.socket, preloaded: str) -> None:
    # By its arguments, ckpt.distributed.launchers takes it for what it stands in for.
    command = [sys.executable, "-m", "warm_ranks", "torch.distributed.run"]
    own = {"PYTHONPATH": PYTHONPATH, "LD_PRELOAD": preloaded, "PLACE_ASLEEP": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | SINGLE_THREAD | NOT_COMPILED | own,
        stdin=listener.fileno(),
        stdout=subprocess.DEVNULL,
    )
    process.returncode = 0  # nobody waits for it: it ends after others than this process


_warm: dict[str, _WarmProcess] = {}  # by what they have preloaded


def run(
    script: str,
    arguments: Sequence[Any],
    *,
    ranks: int,
    limit: float,
    environment: Mapping[str, str],
    elastic: bool = True,
    alone: bool = False,
    shares_imports: bool = True,
) -> Ended:
    """Runs a script on forked ranks; ``subprocess.TimeoutExpired`` after ``limit`` seconds."""
    always = [str(faults.library(source)) for source in (faults.SOURCE, places.SOURCE)]
    more = environment.get("LD_PRELOAD", os.environ.get("LD_PRELOAD", "")).split(":")
    preloaded = ":".join([*always, *(path for path in more if path and path not in always)])
    if preloaded not in _warm or _warm[preloaded].has_ended:
        _warm[preloaded] = _WarmProcess(preloaded)
    launch = Launch(
        script=str(ROOT / script),
        arguments=[str(argument) for argument in arguments],
        ranks=ranks,
        limit=limit,
        environment=os.environ | {"PYTHONPATH": PYTHONPATH} | environment,
        elastic=elastic,
        alone=alone,
        shares_imports=shares_imports,
    )
    return _warm[preloaded].launch(launch)


# From here on: the warm process and its forks.


def serve() -> None:
    """The life of the warm process: a fork for each launch, which forks the ranks."""
    listener = socket.socket(fileno=os.dup(0))
    gc.disable()  # a quarter of the time of the imports, which leave little to collect
    for name in IMPORTED:
        importlib.import_module(name)
    _import_too(IMPORTED_LATER)
    _spare_ranks()
    _build()
    clients: list[_Client] = []
    while True:
        sources = [listener, *(source for client in clients for source in client.sources())]
        ready, _, _ = select.select(sources, [], [], None if clients else LINGER)
        if not ready:
            return
        if listener in ready:
            clients.append(_Client(listener.accept()[0]))
        # What a client asks for next is read after the imports of its last launch.
        left = [client for client in clients if not client.go_on(ready)]
        for client in left:
            clients.remove(client)
            client.close()


class _Client:
    """One that asks for launches, one after the other, and the process of the present one."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.lines = connection, connection.makefile("rw")
        self.pid, self.report = 0, -1
        self.modules: IO[str] | None = None

    def sources(self) -> list[Any]:
        """What there may be something to read from; of a client in a launch that it has gone."""
        return [self.connection, self.report] if self.pid else [self.connection]

    def go_on(self, ready: Sequence[Any]) -> bool:
        """Begins a launch or ends one; ``False`` if the client has gone, or the launch is lost."""
        if self.pid and self.report in ready:
            return self._end()
        if self.connection not in ready:
            return True
        line = self.lines.readline()
        if line:
            self._begin(json.loads(line))
        return bool(line)

    def _begin(self, request: dict[str, Any]) -> None:
        gc.collect()
        gc.freeze()  # so that a collection in a fork copies no page of what was imported
        self.report, writing = os.pipe()
        self.modules = os.fdopen(os.memfd_create("modules"), "w+")
        self.pid = os.fork()
        if not self.pid:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            messages = os.open(request.pop("messages"), os.O_WRONLY | os.O_APPEND)
            code, hung = _run_ranks(Launch(**request), messages, self.modules.fileno())
            os.write(writing, json.dumps({"code": code, "hung": hung}).encode())
            os._exit(0)
        os.close(writing)

    def _end(self) -> bool:
        """Tells the client how a launch ended, and imports what its first rank did."""
        answer = os.read(self.report, 1000).decode()
        with suppress(OSError):  # it has gone
            print(answer, file=self.lines, flush=True)
        os.close(self.report)
        os.waitpid(self.pid, 0)
        self.pid = 0
        assert self.modules is not None
        with self.modules as modules:
            modules.seek(0)
            _import_too(modules.read().split())
        return bool(answer)

    def close(self) -> None:
        """Ends the launch of a client that has gone: the ranks die with the process of it."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        with suppress(OSError):
            self.lines.close()
        self.connection.close()


def _spare_ranks() -> None:
    """Computes once what each rank would compute for itself, a fifth of what a training costs.

    Accelerate parses the metadata of packages whenever it asks whether DeepSpeed is installed,
    transformers compiles all patterns of all its models at the first save of one, and DeepSpeed
    notes ranges for a profiler, which on CPU nobody does, in every hook of every module. For a line
    that nobody sees, its stage 3 formats the values of all parameters. The start of its process
    group tries with a compiler which extensions could be built, 80 ms, its backward pass starts a
    command that counts the sockets of the machine, and before it loads an extension, four Pythons
    ask what the processor is.
    """
    from importlib import metadata

    import cpuinfo
    from deepspeed import ops
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.utils import numa, nvtx

    with suppress(AttributeError):  # older versions try when they are imported
        ops.__compatible_ops__  # noqa: B018
    numa.get_numa_cores = functools.cache(numa.get_numa_cores)

    DeepSpeedZeroOptimizer_Stage3.__init__ = _formatting_no_values(
        DeepSpeedZeroOptimizer_Stage3.__init__
    )
    nvtx.enable_nvtx = False
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    cpuinfo.get_cpu_info()
    metadata.metadata = functools.cache(metadata.metadata)
    metadata.version = functools.cache(metadata.version)
    with suppress(ImportError):  # transformers 5
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")


def _formatting_no_values(function: Callable[..., None]) -> Callable[..., None]:
    from torch.nn import Parameter

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> None:
        with patch.object(Parameter, "__repr__", object.__repr__):
            function(*arguments, **options)

    return call


def _build() -> None:
    """Compiles, if it has to be, the extension that DeepSpeed loads in every rank, for all of them.

    One process of the test run does; a lock that a killed one has left is in nobody's way.
    """
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with (root / "warm_ranks.lock").open("w") as own_lock:
        fcntl.flock(own_lock, fcntl.LOCK_EX)
        (root / ShareMemCommBuilder.NAME / "lock").unlink(missing_ok=True)
        ShareMemCommBuilder().load(verbose=False)


def _import_too(names: Sequence[str]) -> None:
    """Imports what a rank has imported on its way, so that the next are forked with it."""
    of_tests = {path.stem for folder in PATHS for path in Path(folder).iterdir()} - {*PACKAGES}
    for name in names:
        top = name.partition(".")[0]
        if name not in sys.modules and top not in {"__main__", *of_tests, *THREADED}:
            with suppress(Exception):
                importlib.import_module(name)
            _require_one_thread(f"importing {name}")


def _require_one_thread(what: str) -> None:
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"{what} started {threads - 1} threads, which no fork would have")


def _run_ranks(launch: Launch, messages: int, modules: int) -> tuple[int, bool]:
    """The exit code of a launch, and whether it was killed for taking too long."""
    _require_one_thread("an import")
    reading, writing = os.pipe()
    pids = []
    for rank in range(launch.ranks):
        pid = os.fork()
        if not pid:
            os.close(writing)
            _be_rank(launch, rank, reading, messages, modules)  # does not return
        pids.append(pid)
    store = _start_store(writing, launch.ranks) if launch.elastic else None
    notice = float(launch.environment.get("NOTICE", NOTICE))
    code, hung = _wait(pids, launch.limit, notice, messages)
    del store
    return code, hung


def _start_store(writing: int, ranks: int) -> object:
    """Listens where the ranks meet, by a thread, and tells each of them the port."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.write(writing, f"{store.port:{PORT_DIGITS}}".encode() * ranks)
    return store


def _wait(pids: list[int], limit: float, notice: float, messages: int) -> tuple[int, bool]:
    running = dict(enumerate(pids))
    code, hung, kill_at = 0, False, time.monotonic() + limit
    pause, warn_at = 0.005, float("inf")
    while running:
        for rank, pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del running[rank]
            exit_code = os.waitstatus_to_exitcode(status)
            if exit_code:
                how = signal.Signals(-exit_code).name if exit_code < 0 else f"exit {exit_code}"
                os.write(messages, f"warm_ranks: rank {rank} (process {pid}): {how}\n".encode())
            if exit_code and not code:
                code, warn_at = 1, time.monotonic() + notice
                kill_at = min(kill_at, warn_at + GRACE)
        if time.monotonic() > warn_at:
            warn_at = float("inf")
            for other in running.values():
                os.kill(other, signal.SIGTERM)
        if time.monotonic() > kill_at:
            hung, kill_at = not code, float("inf")
            for other in running.values():
                os.kill(other, signal.SIGKILL)
        time.sleep(pause)
        pause = min(0.05, pause * 1.2)
    return code, hung


def _be_rank(launch: Launch, rank: int, reading: int, messages: int, modules: int) -> None:
    """The life of a rank: a fresh process as far as it can tell; ``reading`` tells the port."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        gc.enable()
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)
        os.dup2(messages, 2)
        os.close(messages)
        os.environ.clear()
        os.environ.update(launch.environment)
        if launch.elastic:
            port = int(os.read(reading, PORT_DIGITS))
            os.environ.update(_variables(rank, launch.ranks, port))
        os.close(reading)
        if launch.alone:
            os.environ.update(_variables_of_node(rank, launch.ranks))
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        sys.argv = [launch.script, *launch.arguments]
        sys.path[0] = str(Path(launch.script).parent)
        if not rank and launch.shares_imports:
            _tell_modules_at_end(modules)
        runpy.run_path(launch.script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        raise SystemExit(1) from None
    _end_well()


def _end_well() -> NoReturn:
    """Ends as the interpreter does, but does not free all modules, half a second of a core."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _tell_modules_at_end(descriptor: int) -> None:
    """Writes what this process has imported when it ends, by ``os._exit`` as well.

    Most workers end so (``ending.leave``), and no function of atexit is called then. One is called
    after ``serve`` has been left by an exception, which may close the file: here it is open once
    more.
    """
    own_descriptor = os.dup(descriptor)
    end = os._exit

    def tell() -> None:
        os.write(own_descriptor, "".join(f"{name}\n" for name in list(sys.modules)).encode())

    def end_telling(code: int) -> NoReturn:
        tell()
        end(code)

    atexit.register(tell)
    os._exit = end_telling


def _variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun (torch 2.13 ``elastic/agent/server/local_elastic_agent.py``) sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "ROLE_RANK": str(rank),
        "ROLE_NAME": "default",
        "LOCAL_WORLD_SIZE": str(ranks),
        "WORLD_SIZE": str(ranks),
        "GROUP_WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


def _variables_of_node(node: int, nodes: int) -> dict[str, str]:
    """What is otherwise where each node has a torchrun of its own, with one rank."""
    return {
        "LOCAL_RANK": "0",
        "GROUP_RANK": str(node),
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_WORLD_SIZE": str(nodes),
    }


if __name__ == "__main__":
    serve()
    os._exit(0)
