"""macOS and Windows as far as a program can tell on Linux: what they lack is taken away.

    python -m other_systems windows show out/checkpoint-1      the command, as it runs there

Which names are missing comes from the authority, the stubs of Python's own modules that mypy has
(``os``, ``errno``, ``signal`` ...): those that they declare for Linux and not for the system. What
a call does otherwise there is imitated: Windows opens files as text unless told not to, opens no
folder, syncs nothing that is open for reading alone, and neither renames nor removes what is open.

A process of its own for each: nothing of it can be undone.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import errno
import importlib
import io
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PLATFORMS = {"macos": "darwin", "windows": "win32"}
MODULES = ("os", "errno", "signal", "mmap", "fcntl", "resource")
ABSENT = {"windows": ("fcntl", "resource", "pwd", "grp", "termios", "syslog"), "macos": ()}
# What the stubs declare for every system, in a comment "Unix only".
UNIX_ONLY = ("O_CLOEXEC", "O_DIRECTORY", "O_NONBLOCK", "O_NOFOLLOW", "O_SYNC", "O_DSYNC")
LINUX_ONLY = ("O_TMPFILE", "O_PATH", "O_DIRECT", "O_NOATIME")
# Functions of the C library that Linux alone has.
OF_GLIBC = {"fallocate", "fallocate64", "renameat2", "syncfs", "mallopt"}
BINARY = 0x8000  # O_LARGEFILE, which changes nothing on a system of 64 bits
# Loaded before anything is taken away: these ask Linux for what it has alone.
LOADED = (
    *("asyncio", "concurrent.futures.thread", "logging.handlers", "multiprocessing.connection"),
    *("selectors", "ssl", "subprocess", "tempfile", "uuid", "numpy", "filelock"),
)
STANDARD = {"__main__", __name__, *sys.stdlib_module_names}


def become(system: str) -> None:
    """Makes of this process one of macOS or Windows."""
    assert not {"ckpt", "converters"} & set(sys.modules), "it is too late"

    for name in LOADED:
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
    _leave_to_others()
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    shutil._copyxattr = lambda *_, **__: None  # type: ignore[attr-defined]
    statvfs = os.statvfs
    if system == "windows":
        _imitate_windows()
    else:
        _imitate_macos()
    _hide_proc()
    _hide_glibc(system)

    for name in ABSENT[system]:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in MODULES:
        if name not in ABSENT[system]:
            module = importlib.import_module(name)
            for missing in missing_names(name, system) & set(vars(module)):
                delattr(module, missing)

    def disk_usage(path: Any) -> Any:
        status = statvfs(path)
        total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
        return shutil._ntuple_diskusage(total, total - free, free)  # type: ignore[attr-defined]

    shutil.disk_usage = disk_usage


def missing_names(module: str, system: str) -> set[str]:
    """The names of a module that Linux has and the system has not."""
    here = _declared(module, "linux")
    names = here - _declared(module, PLATFORMS[system])
    if module == "os":
        names |= {*LINUX_ONLY, *(UNIX_ONLY if system == "windows" else ())}
    return names


def _declared(module: str, platform: str) -> set[str]:
    """The names that a stub declares for a platform."""
    import mypy

    stubs = Path(mypy.__file__).parent / "typeshed/stdlib"
    path = stubs / f"{module}.pyi"
    path = path if path.exists() else stubs / module / "__init__.pyi"
    return set(_names(ast.parse(path.read_text("utf-8")).body, platform))


def _names(body: list[ast.stmt], platform: str) -> Iterator[str]:
    for node in body:
        match node:
            case ast.If():
                yield from _names(
                    node.body if _holds(node.test, platform) else node.orelse, platform
                )
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)]):
                yield name
            case ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name for alias in names)


def _holds(test: ast.expr, platform: str) -> bool:
    system = SimpleNamespace(platform=platform, version_info=sys.version_info)
    return bool(eval(compile(ast.Expression(test), "stub", "eval"), {"sys": system}))


def _leave_to_others() -> None:
    """Lets the library that locks files for the Hub's client, which asks for Linux, have it."""
    linux = SimpleNamespace(**vars(os))
    for name, module in list(sys.modules.items()):
        if name.startswith("filelock.") and hasattr(module, "os"):
            module.os = linux  # type: ignore[attr-defined]


def _hide_proc() -> None:
    """No file below /proc, however it is asked for."""

    def without_proc(call: Callable[..., Any]) -> Callable[..., Any]:
        def asked(path: Any, *args: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike) and str(path).startswith("/proc"):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
            return call(path, *args, **options)

        return asked

    builtins.open = io.open = without_proc(builtins.open)  # type: ignore[assignment]
    for name in ("open", "stat", "listdir", "scandir", "readlink"):
        setattr(os, name, without_proc(getattr(os, name)))


def _hide_glibc(system: str) -> None:
    class Library(ctypes.CDLL):
        def __init__(self, name: Any, *args: Any, **options: Any) -> None:
            if name is None and system == "windows":
                raise TypeError("LoadLibrary() argument 1 must be str, not None")
            super().__init__(name, *args, **options)

        def __getattr__(self, name: str) -> Any:
            if name in OF_GLIBC:
                raise AttributeError(name)
            return super().__getattr__(name)

    ctypes.CDLL = Library  # type: ignore[misc]
    if system == "windows":
        ctypes.windll = object()  # type: ignore[attr-defined,unused-ignore]


def _imitate_macos() -> None:
    import fcntl

    pwritev, control, sync = os.pwritev, fcntl.fcntl, os.fsync

    def pwritev_of_macos(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags:
            raise NotImplementedError("pwritev2: flags unavailable on this platform")
        return pwritev(fd, buffers, offset)

    def fcntl_of_macos(fd: Any, command: int, argument: Any = 0) -> Any:
        return sync(fd) if command == fcntl.F_FULLFSYNC else control(fd, command, argument)

    os.pwritev = pwritev_of_macos
    fcntl.F_FULLFSYNC = 51
    fcntl.fcntl = fcntl_of_macos  # type: ignore[assignment]


def _imitate_windows() -> None:
    os.O_BINARY = BINARY
    open_file, sync, listdir, readlink = os.open, os.fsync, os.listdir, os.readlink
    replace, rename, kill = os.replace, os.rename, os.kill

    def opened(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        if _is_ours() and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        is_text = not flags & BINARY and _is_ours(directly=True)
        assert not is_text, f"{path} is opened as text: its bytes would change"
        return open_file(path, flags, mode, **options)

    def synced(fd: Any) -> None:
        number = fd if isinstance(fd, int) else fd.fileno()
        if _is_ours() and not _modes[control(number, get_flags) & 3]:
            raise OSError(errno.EBADF, "Bad file descriptor")
        sync(number)

    def require_closed(*paths: Any) -> None:
        """As Windows: what is open, or has something open in it, keeps its name."""
        if not _is_ours():
            return

        open_paths = []
        for number in listdir("/proc/self/fd"):
            try:
                open_paths.append(readlink(f"/proc/self/fd/{number}"))
            except OSError:
                continue
        for path in paths:
            real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            if any(each == real or each.startswith(f"{real}/") for each in open_paths):
                raise PermissionError(errno.EACCES, "it is open in this process", str(path))

    def renamed(source: Any, target: Any, **options: Any) -> None:
        if _is_ours() and os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        require_closed(source)
        rename(source, target, **options)

    def replaced(source: Any, target: Any, **options: Any) -> None:
        if _is_ours() and os.path.isdir(target):
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        require_closed(source, target)
        replace(source, target, **options)

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def removed(path: Any, **options: Any) -> Any:
            require_closed(path)
            return call(path, **options)

        return removed

    def refused(source: Any, target: Any, *_: Any, **__: Any) -> None:
        raise OSError(errno.EINVAL, "A required privilege is not held by the client", str(target))

    def killed(pid: int, number: int) -> None:
        assert number, "0 is CTRL_C_EVENT there, and ends every process of the console"
        kill(pid, number)

    import fcntl

    control, get_flags = fcntl.fcntl, fcntl.F_GETFL
    _modes = {os.O_RDONLY: False, os.O_WRONLY: True, os.O_RDWR: True}
    os.open, os.fsync, os.rename, os.replace = opened, synced, renamed, replaced  # type: ignore
    os.unlink, os.remove, os.rmdir = (guarded(each) for each in (os.unlink, os.remove, os.rmdir))
    os.symlink, os.kill = refused, killed  # type: ignore[assignment]
    pathlib.Path.symlink_to = lambda path, target, *_: refused(target, path)  # type: ignore


def _is_ours(directly: bool = False) -> bool:
    """Whether a module of ckpt asks, itself or by Python's own, and not a library of others."""
    frame = sys._getframe(1)
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).split(".")[0]
        if package not in (("__main__", __name__) if directly else STANDARD):
            return package in ("ckpt", "converters")
        frame = frame.f_back  # type: ignore[assignment]
    return False


def main() -> None:
    """Runs ``ckpt`` with the arguments that follow the name of the system."""
    become(sys.argv[1])
    from ckpt.cli.main import main as command

    command(sys.argv[2:])


if __name__ == "__main__":
    main()
