"""Options in messages: a command's ``--tag TAG`` is a function's ``tag=TAG``.

A message is written once, with an ``Option`` in it, which becomes text in the words of
whoever asked: the command line names options, a function its own arguments (``using``).
What a function lacks, and whatever nobody asked for, is named with the command that has
it: ``ckpt to-fp32 --merge``.

Commands that are named with all of their options (``ckpt doctor RUN --adopt``) are
commands to everyone, and plain text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a command, by its name without dashes: "tp-rules".

    ``command`` is one that has it. ``str`` spells it; a call spells it with a value,
    which is a placeholder if it is in capitals: ``TAG("global_step5")``, ``TAG("TAG")``.
    """

    name: str
    command: str = "to-fp32"

    @property
    def flag(self) -> str:
        """The option as commands have it."""
        return "-o" if self.name == "output" else f"--{self.name}"

    def __str__(self) -> str:
        return self("")

    def __call__(self, value: object) -> str:
        """The option with a value, in the words of whoever asked."""
        return _spelling.get()(self, str(value))


Spelling = Callable[[Option, str], str]


def of_commands(option: Option, value: str) -> str:
    """``--tag TAG``."""
    return f"{option.flag} {value}".rstrip()


def of_functions(arguments: Mapping[str, str]) -> Spelling:
    """The spelling of a function that has these arguments, by the option's name.

    An argument is ``tag=`` or has its value, as ``merge=True``.
    """

    def spell(option: Option, value: str) -> str:
        argument = arguments.get(option.name)
        if argument is None:
            return f"ckpt {option.command} {of_commands(option, value)}"
        if not value or not argument.endswith("="):
            return argument
        is_placeholder = value.isalpha() and value.isupper()
        return f"{argument}{value}" if is_placeholder else f'{argument}"{value}"'

    return spell


def of_command(own_values: Mapping[str, Collection[str]]) -> Spelling:
    """The spelling of a command that has few options; others are named with theirs.

    ``own_values``: the values that an option takes, by its name.
    """

    def spell(option: Option, value: str) -> str:
        flag = of_commands(option, value)
        is_own = option.name in own_values and value in ("", *own_values[option.name])
        return flag if is_own else f"ckpt {option.command} {flag}"

    return spell


_OF_NOBODY = of_functions({})
_spelling: ContextVar[Spelling] = ContextVar("spelling", default=_OF_NOBODY)
_is_chosen: ContextVar[bool] = ContextVar("is_chosen", default=False)


@contextmanager
def using(spelling: Spelling, *, overrides: bool = False) -> Iterator[None]:
    """Options in this block are spelled so.

    Of functions that call each other the outermost one is the user's, so that an inner
    block changes nothing, unless it ``overrides``.
    """
    if _is_chosen.get() and not overrides:
        yield
        return

    tokens = _spelling.set(spelling), _is_chosen.set(True)
    try:
        yield
    finally:
        _spelling.reset(tokens[0])
        _is_chosen.reset(tokens[1])


ADAPTER_CONFIG = Option("adapter-config")
ALLOW_OVERFLOW = Option("allow-overflow")
BASE = Option("base")
BEST = Option("best", "push")
BUFFER = Option("buffer", "from-dcp")
CHECK = Option("check")
CONFIG = Option("config")
DEQUANTIZE = Option("dequantize")
DTYPE = Option("dtype")
EP = Option("ep", "reshard")
EXCLUDE_FROZEN = Option("exclude-frozen")
FILES = Option("files", "to-dcp")
FORCE = Option("force", "slim")
FORMAT = Option("format")
INCLUDE_TRAINING_STATE = Option("include-training-state", "push")
KEEP_LAST = Option("keep-last", "push")
LAST = Option("last")
LAYOUT = Option("layout", "to-dcp")
LIKE = Option("like", "from-universal")
MAX_SHARD_SIZE = Option("max-shard-size")
MERGE = Option("merge")
NAMES = Option("names")
NO_VERIFY = Option("no-verify")
NO_VERIFY_OF_STATES = Option("no-verify", "reshard")
NO_ZERO_INIT = Option("no-zero-init", "reshard")
OTHER_BASE = Option("other-base")
OUTPUT = Option("output")
OVERWRITE = Option("overwrite")
PART = Option("part")
PATH_IN_REPO = Option("path-in-repo", "push")
RENAME = Option("rename")
REVISION = Option("revision", "push")
SAMPLE = Option("sample", "verify")
SEED = Option("seed", "verify")
SELECT = Option("select")
SHARE = Option("share")
STAGE = Option("stage", "reshard")
STAGE_DIR = Option("stage-dir", "push")
STATE = Option("state", "stats")
STRIP = Option("strip")
TAG = Option("tag")
TIED = Option("tied")
TOKENIZER = Option("tokenizer")
TP = Option("tp", "reshard")
PP = Option("pp", "reshard")
TP_RULES = Option("tp-rules")
TRANSPORT = Option("transport", "push")
UNCOMMITTED = Option("uncommitted", "push")
UNTIE = Option("untie")
WEIGHTS = Option("weights")
WORLD_SIZE = Option("world-size", "reshard")
ZERO_INIT = Option("zero-init", "reshard")
