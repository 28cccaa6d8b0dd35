"""What hostile pickles call: each touches the canary, if anybody calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hardening.hostile.opcodes import Call, Name

Payload = Callable[[Path], Call]


def _touch(path: Path) -> str:
    return f"touch {path}"


def _python(path: Path) -> str:
    return f"open({str(path)!r}, 'w')"


def _call(module: str, name: str, *args: object) -> Call:
    return Call(Name(module, name), args)


def _attribute(of: object, name: str) -> Call:
    return _call("builtins", "getattr", of, name)


PAYLOADS: dict[str, Payload] = {
    "os.system": lambda p: _call("os", "system", _touch(p)),
    "posix.system": lambda p: _call("posix", "system", _touch(p)),
    "nt.system": lambda p: _call("nt", "system", _touch(p)),
    "os.popen": lambda p: _call("os", "popen", _touch(p)),
    "os.open": lambda p: _call("os", "open", str(p), 0o102),
    "builtins.eval": lambda p: _call("builtins", "eval", _python(p)),
    "builtins.exec": lambda p: _call("builtins", "exec", _python(p)),
    "__builtin__.eval": lambda p: _call("__builtin__", "eval", _python(p)),
    "builtins.open": lambda p: _call("builtins", "open", str(p), "w"),
    "io.open": lambda p: _call("io", "open", str(p), "w"),
    "subprocess.Popen": lambda p: _call("subprocess", "Popen", ["touch", str(p)]),
    "subprocess.check_output": lambda p: _call("subprocess", "check_output", ["touch", str(p)]),
    "pathlib, dotted": lambda p: _call("pathlib", "os.system", _touch(p)),
    "torch.serialization, dotted": lambda p: _call("torch.serialization", "os.system", _touch(p)),
    "runpy.run_path": lambda p: _call("runpy", "run_path", str(p)),
    "pty.spawn": lambda p: _call("pty", "spawn", ["touch", str(p)]),
    "timeit.timeit": lambda p: _call("timeit", "timeit", _python(p), "pass", None, 1),
    "pdb.run": lambda p: _call("pdb", "run", _python(p)),
    "cProfile.run": lambda p: _call("cProfile", "run", _python(p)),
    "code.interact": lambda p: Call(
        _attribute(_call("code", "InteractiveInterpreter"), "runcode"), (_python(p),)
    ),
    "shutil.copyfile": lambda p: _call("shutil", "copyfile", "/dev/null", str(p)),
    "pickle.loads": lambda p: _call("pickle", "loads", f"cos\nsystem\n(V{_touch(p)}\ntR."),
    "importlib.import_module": lambda p: Call(
        _attribute(_call("importlib", "import_module", "os"), "system"), (_touch(p),)
    ),
    "getattr chain": lambda p: Call(
        _attribute(_attribute(Name("torch", "serialization"), "os"), "system"), (_touch(p),)
    ),
    "getattr of globals": lambda p: Call(
        _attribute(_attribute(Name("torch", "load"), "__globals__"), "get"), ("os",)
    ),
    "operator.attrgetter": lambda p: Call(
        Call(_call("operator", "attrgetter", "os.system"), (Name("torch", "serialization"),)),
        (_touch(p),),
    ),
    "operator.methodcaller": lambda p: Call(
        _call("operator", "methodcaller", "system", _touch(p)), (Name("torch", "os"),)
    ),
    "functools.partial": lambda p: Call(
        _call("functools", "partial", Name("os", "system"), _touch(p)), ()
    ),
    "builtins.map": lambda p: _call(
        "builtins", "list", _call("builtins", "map", Name("builtins", "eval"), [_python(p)])
    ),
    "numpy runstring": lambda p: _call("numpy.testing._private.utils", "runstring", _python(p), {}),
    "numpy.fromfile": lambda p: _call("numpy", "fromfile", str(p)),
    "numpy.load": lambda p: _call("numpy", "load", str(p)),
    "torch.load": lambda p: _call("torch", "load", str(p)),
    "torch.hub.load": lambda p: _call("torch.hub", "load", "a/b", "c"),
    "torch._dynamo": lambda p: _call(
        "torch._dynamo.guards", "GuardBuilder.get", Name("builtins", "object"), _python(p)
    ),
    "torch._inductor": lambda p: _call(
        "torch._inductor.codecache", "run_command_and_check", ["touch", str(p)]
    ),
    "torch.storage nested": lambda p: _call("torch.storage", "_load_from_bytes", "cos\nsystem\n"),
    "ctypes.CDLL": lambda p: _call("ctypes", "CDLL", str(p)),
    "webbrowser.open": lambda p: _call("webbrowser", "open", f"file://{p}"),
    "multiprocessing": lambda p: _call(
        "multiprocessing.util", "spawnv_passfds", "/usr/bin/touch", ["touch", str(p)], []
    ),
}
