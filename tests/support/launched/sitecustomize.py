"""The ranks of real launchers as forks of them: torch is imported once, and not by each rank.

Every Python that has this folder in PYTHONPATH imports this module when it starts, and so does a
launcher (``launches.forking``). It starts its ranks as always, with ``subprocess.Popen``; if they
are to run $FORKED_SCRIPT, they do it in the fork, where otherwise a new Python would be executed.
So they are its children, it signals them and waits for them, and only their imports are shared.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

_start = subprocess.Popen.__init__


def _start_or_fork(
    self: subprocess.Popen[Any], args: Any, *rest: Any, env: Any = None, **options: Any
) -> None:
    words = [] if isinstance(args, str) else [str(word) for word in args if word != "-u"]
    if words[:2] == [sys.executable, os.environ.get("FORKED_SCRIPT")]:
        environment = dict(os.environ if env is None else env)
        options["preexec_fn"] = partial(_be_rank, words[1:], environment)
    _start(self, args, *rest, env=env, **options)


def _be_rank(words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """The life of a rank: what the launcher has set up in its own process is not there."""
    import atexit
    import runpy

    _forget_launcher()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [*words]
    sys.path[0] = os.path.dirname(words[0])
    code: Any = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _forget_launcher() -> None:
    """Its files and sockets, handlers of signals and messages, and what it does at its end."""
    import atexit
    import gc
    import logging
    import signal

    os.closerange(3, 4096)  # the last of them tells the launcher that its rank has started
    gc.enable()
    atexit._clear()
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            is_of_python = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_of_python else signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as every Python has it
        signal.signal(number, signal.SIG_IGN)


subprocess.Popen.__init__ = _start_or_fork  # type: ignore[method-assign]
