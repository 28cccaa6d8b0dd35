"""Names that no honest checkpoint's pickle holds: calling them runs code or reaches into files.

The interpreter calls nothing, so a name here does no more harm to the reader than any other. But
``torch.load`` and ``pickle.load`` of the same file would do what it asks, so a file that names one
is refused, wherever in it the name stands. The list makes nobody safe and cannot be complete: what
is not on it stays an inert record. Known gadgets: the lists of picklescan 1.0 and fickling 0.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from converters.records import Global, Record


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MODULES = _words(
    """
    os posix nt posixpath ntpath subprocess _posixsubprocess commands popen2 pty runpy imp _imp
    zipimport pkgutil _ctypes code codeop pdb bdb timeit cProfile profile trace doctest pickle
    _pickle cPickle marshal shelve shutil tempfile fileinput glob socket _socket socketserver ssl
    ftplib smtplib telnetlib poplib imaplib webbrowser antigravity pydoc site sys gc inspect atexit
    faulthandler http.server http.client urllib urllib2 urllib.request linecache platform tarfile
    zipfile _thread _xxsubinterpreters _interpreters unittest.mock concurrent.futures.process
    torch.utils.collect_env torch.utils._config_module torch.cuda.tunable torch.distributed.run
    torch.utils.data.datapipes.utils.decoder numpy.lib.npyio multiprocessing.util
    multiprocessing.popen_fork multiprocessing.popen_spawn_posix
    """
)
# With all modules below them.
_PACKAGES = _words(
    """
    importlib ctypes cffi distutils lib2to3 idlelib ensurepip venv pip asyncio xmlrpc sqlite3
    torch.hub torch.package torch.utils.cpp_extension torch.utils.bottleneck torch.testing torch.jit
    torch._dynamo torch._inductor torch.distributed.launcher torch.distributed.elastic torch.ops
    torch.classes torch.distributed.rpc numpy.testing numpy.f2py numpy.distutils numpy.ctypeslib
    joblib pandas.io
    """
)
_OF_MODULES = {
    "builtins": _words(
        "eval exec execfile compile __import__ open input raw_input apply globals locals vars "
        "setattr delattr exit quit help breakpoint file reload"
    ),
    "io": frozenset(("open", "open_code", "FileIO")),
    "torch": frozenset(("load", "save")),
    "torch.serialization": frozenset(("load", "save", "_load", "_legacy_load")),
    "numpy": frozenset(("load", "save", "fromfile", "loadtxt", "savetxt", "genfromtxt")),
    "pandas": frozenset(("read_pickle", "eval")),
    "signal": frozenset(("signal", "alarm", "raise_signal", "pthread_kill", "setitimer")),
    "types": frozenset(("CodeType", "FunctionType")),
    "operator": frozenset(("call",)),
}
_OF_MODULES["__builtin__"] = _OF_MODULES["builtins"]
_OF_MODULES["_operator"] = _OF_MODULES["operator"]
_OF_MODULES["_io"] = _OF_MODULES["io"]
# Told by their names, whatever module re-exports them.
_ANYWHERE = _words(
    """
    popen popen2 popen3 execfile execv execve execl execlp execvp execvpe posix_spawn posix_spawnp
    spawnl spawnle spawnlp spawnv spawnve spawnvp forkpty Popen check_output check_call getoutput
    getstatusoutput import_module load_library runstring _load_from_bytes _forward_from_src
    os sys subprocess posix importlib ctypes shutil builtins __import__ __builtins__
    """
)
# Taken out of an object, or of a module that another one imports.
_ATTRIBUTES = _ANYWHERE | {"system", "eval", "exec", "fork", "run_module", "run_path"}
_DATA = frozenset(  # classes in these modules that are mere data
    (
        *(("os", name) for name in ("PathLike", "stat_result", "terminal_size", "sched_param")),
        *(("sys", name) for name in ("version_info", "float_info", "int_info", "flags")),
        *(("inspect", name) for name in ("Signature", "Parameter", "_ParameterKind")),
        ("pickle", "PickleBuffer"),
        ("torch._dynamo.eval_frame", "OptimizedModule"),
    )
)
_BYTES = {"bytes", "bytearray"}  # of a number: so many zeros
_BUILDING = _BYTES | {"list", "tuple", "set", "frozenset", "sorted"}
_REACHING = {"getattr", "attrgetter", "methodcaller"}


def runs_code(module: str, name: str) -> bool:
    """Whether a global is one that runs code or reaches into files when it is called."""
    if (module, name) in _DATA:
        return False
    places = module.split(".")
    inside = any(".".join(places[:n]) in _PACKAGES for n in range(1, min(len(places), 4) + 1))
    if inside or module in _MODULES or name in _ANYWHERE or name in _OF_MODULES.get(module, ()):
        return True
    return "." in name and _reaches(name, through=name.split(".")[:-1])


def reaches(name: str, args: Iterable[Any]) -> bool:
    """Whether a call of ``name`` takes such a thing out of an object, as getattr does."""
    if name not in _REACHING:
        return False
    return any(isinstance(arg, str) and _reaches(arg, through=arg.split(".")) for arg in args)


def allocates(of: Global, args: Sequence[Any]) -> bool:
    """Whether a call makes as many values as a number says: no pickler asks for them so."""
    if of.module not in ("builtins", "__builtin__") or of.name not in _BUILDING or len(args) != 1:
        return False
    if isinstance(args[0], Record):  # picklers write out what is in a list
        return isinstance(args[0].of, Global) and args[0].of.name in ("range", "xrange")
    return of.name in _BYTES and isinstance(args[0], int)


def _reaches(name: str, through: list[str]) -> bool:
    """Whether a dotted name ends in, or leads through, what runs code."""
    parts = name.split(".")
    hidden = any(part.startswith("__") and part.endswith("__") for part in parts)
    return hidden or parts[-1] in _ATTRIBUTES or any(part in _MODULES for part in through)
