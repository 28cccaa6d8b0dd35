"""Regular expressions of a user, replaced in names in bounded time.

``re`` takes exponential time for expressions such as ``(\\w+\\.?)+!``, and nothing in
the process can stop it. So what repeats runs in a child process, which is ended when its
time is over.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from converters.errors import CheckpointError

SECONDS = 10.0
_REPEATS = frozenset("*+{?")
_CHILD = """
import json, re, sys
expression, replacement, names = json.load(sys.stdin)
pattern = re.compile(expression)
try:
    json.dump([pattern.sub(replacement, name) for name in names], sys.stdout)
except (re.error, IndexError) as error:
    json.dump({"error": str(error)}, sys.stdout)
"""


def replaced(expression: str, replacement: str, names: Sequence[str]) -> list[str]:
    """The names, in order, after ``re.sub``.

    ``CheckpointError`` (kind "refused") for a replacement that does not fit the
    expression, and for an expression that takes over ``SECONDS``.
    """
    if _REPEATS.isdisjoint(expression) or not sys.executable:
        pattern = re.compile(expression)  # the user's, tried by ``selection`` already
        try:
            return [pattern.sub(replacement, name) for name in names]
        except (re.error, IndexError) as error:
            raise _unfit(expression, replacement, str(error)) from error

    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    request = json.dumps([expression, replacement, list(names)])
    try:
        process = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"{expression!r} takes over {SECONDS:g} seconds on {len(names)} names; "
            "write it without a repetition inside a repetition, such as (a+)+",
            "refused",
        ) from error
    except (OSError, subprocess.CalledProcessError) as error:
        raise CheckpointError(
            f"{expression!r} could not be tried on {len(names)} names: {error}", "refused"
        ) from error

    answer = json.loads(process.stdout)
    if isinstance(answer, dict):
        raise _unfit(expression, replacement, answer["error"])

    return [str(name) for name in answer]


def _unfit(expression: str, replacement: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{replacement!r} cannot replace {expression!r}: {reason}",
        "refused",
    )
