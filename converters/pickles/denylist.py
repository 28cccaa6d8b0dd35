"""Names that no honest checkpoint's pickle holds:
calling them runs code or reaches into files.

The interpreter calls nothing, so a name here does no more harm to the reader than any
other. But ``torch.load`` and ``pickle.load`` of the same file would do what it asks, so
a file that names one is refused, wherever in it the name stands. The list makes nobody
safe and cannot be complete: what is not on it stays an inert record. Audience gadgets:
the lists of picklescan 1.0 and fickling 0.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from converters.pickles.values import Call, Global


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
        "eval exec execfile compile __import__ open input raw_input apply globals "
        "locals vars setattr delattr exit quit help breakpoint file reload"
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
# Classes in these modules that are mere data, whose making does nothing. Python writes
# subprocess as commands where a pickle is of protocol 2.
_DATA = {
    "os": _words("PathLike stat_result statvfs_result terminal_size sched_param times_result"),
    "posix": _words("uname_result times_result stat_result sched_param"),
    "nt": _words("uname_result times_result stat_result"),
    "sys": _words("version_info float_info int_info flags"),
    "platform": _words("uname_result"),
    "inspect": _words(
        "Signature Parameter BoundArguments _ParameterKind _empty FullArgSpec ArgInfo "
        "ClosureVars Attribute"
    ),
    "subprocess": _words("CompletedProcess TimeoutExpired"),
    "commands": _words("CompletedProcess TimeoutExpired CalledProcessError SubprocessError"),
    "pickle": _words("PickleBuffer"),
    "socket": _words("AddressFamily SocketKind MsgFlag AddressInfo gaierror herror timeout"),
    "ssl": _words("TLSVersion VerifyMode VerifyFlags Options"),
    "shutil": _words("_ntuple_diskusage"),
    "zipfile": _words("ZipInfo BadZipFile LargeZipFile"),
    "tarfile": _words("TarInfo"),
    "importlib.metadata": _words("PackagePath"),
    "asyncio.exceptions": _words("CancelledError"),
    "torch.utils.collect_env": _words("SystemEnv"),
    "torch._dynamo.eval_frame": _words("OptimizedModule"),
    "torch._dynamo.decorators": _words("_DimRange"),  # of nested tensors; torch.load allows it
}
_EXCEPTIONS = _words(  # modules whose exceptions are in states now and then
    "subprocess pickle _pickle shutil socket ssl zipfile tarfile sqlite3 ctypes asyncio.exceptions"
)
_BYTES = {"bytes", "bytearray"}  # of a number: so many zeros
_BUILDING = _BYTES | {"list", "tuple", "set", "frozenset", "sorted"}
_REACHING = {"getattr", "attrgetter", "methodcaller"}


def runs_code(module: str, name: str) -> bool:
    """Whether a global is one that runs code or reaches into files when it is called."""
    if name in _DATA.get(module, ()) or _is_exception(module, name):
        return False

    module_parts = module.split(".")
    parents = (".".join(module_parts[:n]) for n in range(1, min(len(module_parts), 4) + 1))
    if module in _MODULES or any(parent in _PACKAGES for parent in parents):
        return True
    if name in _ANYWHERE or name in _OF_MODULES.get(module, ()):
        return True

    return "." in name and _reaches(name, path_parts=name.split(".")[:-1])


def _is_exception(module: str, name: str) -> bool:
    return module in _EXCEPTIONS and name.isidentifier() and name.endswith("Error")


def reaches(name: str, arguments: Iterable[Any]) -> bool:
    """Whether a call of ``name`` takes such a thing out of an object,
    as getattr does."""
    if name not in _REACHING:
        return False
    return any(
        isinstance(argument, str) and _reaches(argument, path_parts=argument.split("."))
        for argument in arguments
    )


def allocates(function: Global, arguments: Sequence[Any]) -> bool:
    """Whether a call makes as many values as a number says:
    no pickler asks for them so."""
    is_builtin = function.module in ("builtins", "__builtin__")
    if not is_builtin or function.name not in _BUILDING or len(arguments) != 1:
        return False
    if isinstance(arguments[0], Call):  # picklers write out what is in a list
        callee = arguments[0].of
        return isinstance(callee, Global) and callee.name in ("range", "xrange")

    return function.name in _BYTES and isinstance(arguments[0], int)


def _reaches(name: str, path_parts: list[str]) -> bool:
    """Whether a dotted name ends in, or leads through, what runs code."""
    parts = name.split(".")
    has_dunder = any(part.startswith("__") and part.endswith("__") for part in parts)
    if has_dunder or parts[-1] in _ATTRIBUTES:
        return True
    return any(part in _MODULES for part in path_parts)
