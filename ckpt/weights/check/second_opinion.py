"""The installed transformers is asked where the table of names would refuse an output.

The table that comes with ckpt is of one version of transformers, and was made by varying
the fields of each configuration one by one. So it may be wrong about a model; then the
library that will read the output knows better. It runs in a process of its own and takes
some seconds, so it is asked only where something is amiss by the table, or where layers
are of several kinds: the table does not know which of them a configuration wants where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ckpt.weights import advice
from ckpt.weights.reader.audience import Audience
from ckpt.weights.reader.verdict import LoadVerdict
from ckpt.weights.request import Check
from converters.errors import CheckpointError

Judge = Callable[[Check], LoadVerdict]


def judged(judge: Judge, audience: Audience) -> LoadVerdict:
    """The verdict by the table;
    by the installed transformers where the table has doubts.

    ``judge`` gives the verdict of one of both. ``CheckpointError`` (kind "unloadable")
    where the output would not load by both, or by the table where transformers does not
    answer.
    """
    refusal, verdict = None, None
    try:
        verdict = judge("names")
    except CheckpointError as error:
        from ckpt.weights.check.refusals import AbsurdConfigError

        if isinstance(error, AbsurdConfigError) or error.kind != "unloadable":
            raise
        refusal = error

    if verdict is not None and not _doubtful(verdict, audience):
        return verdict

    from ckpt.weights.reader import installed

    try:
        second = judge("transformers")
    except installed.NoAnswerError:
        if verdict is None:
            assert refusal is not None
            raise refusal from None
        return verdict
    except CheckpointError as error:
        raise _agreed(refusal or error) from None

    if verdict is not None and (second.loads is None or _agree(verdict, second)):
        return verdict

    note = "the table of names that comes with ckpt is unsure of this model: transformers was asked"
    return replace(second, notes=(note, *second.notes))


def _agree(verdict: LoadVerdict, second: LoadVerdict) -> bool:
    """Whether both name the same class, and the same names as missing and as not read."""
    names = [(set(each.missing), set(each.unexpected)) for each in (verdict, second)]
    return verdict.reader == second.reader and names[0] == names[1]


def _doubtful(verdict: LoadVerdict, audience: Audience) -> bool:
    """Whether the table says that something is amiss."""
    if verdict.reader is None:
        return False

    is_other = audience.architecture not in (None, verdict.reader)
    return bool(verdict.missing or verdict.unexpected or verdict.has_kinds or is_other)


def _agreed(refusal: CheckpointError) -> CheckpointError:
    """The refusal, without the advice to ask transformers, which was asked."""
    text = str(refusal).replace(
        advice.ask_transformers(), "the installed transformers was asked and says the same"
    )
    return CheckpointError(text, refusal.kind)
