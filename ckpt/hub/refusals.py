"""What the Hub and its client refuse, as one line for whoever pushes.

Nothing of a request is repeated, so that no token and no signed address gets into a message.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpt.hub.patience import status
from converters.errors import CheckpointError

LONGEST = 300  # characters of the Hub's own words
AGAIN = "the same command goes on where it stopped"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust ends the text of one
_DISK = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT}
LOGIN = "log in with hf auth login, or set HF_TOKEN"


def require_client() -> None:
    """``CheckpointError`` unless huggingface_hub is installed."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            "huggingface_hub is not installed; pip install 'ckpt-toolkit[hub]'", "unsupported"
        ) from error


def quiet() -> None:
    """Keeps the client from writing to stderr itself: bars, and warnings with addresses in them."""
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    logging.set_verbosity(40)  # errors only


@contextmanager
def at(*places: object) -> Iterator[None]:
    """Has what the client says of a disk name the file that it worked on, or the folder of several.

    Python's errors of reading and writing name none, and hf_xet's are text.
    """
    try:
        yield
    except Exception as error:
        paths = [str(place) for place in places if isinstance(place, str | Path)]
        for one in causes(error) if paths else ():
            if isinstance(one, OSError) and one.errno is not None:
                if one.errno in _DISK and not one.filename:
                    one.filename = os.path.commonpath(paths)
            elif (found := _OS_ERROR.search(str(one))) and (number := int(found[1])) in _DISK:
                raise OSError(number, os.strerror(number), os.path.commonpath(paths)) from error
        raise


def interrupted(error: BaseException) -> bool:
    """Whether a signal came while hf_xet read a file: it gives up then, as Python does not."""
    found = [_OS_ERROR.search(str(one)) for one in causes(error)]
    return any(one is not None and int(one[1]) == errno.EINTR for one in found)


@contextmanager
def told(repo: str) -> Iterator[None]:
    """Turns what the client raises into ``CheckpointError``, and leaves everything else."""
    try:
        yield
    except Exception as error:
        if (line := said(repo, error)) is None:
            raise
        raise line from error


def said(repo: str, error: BaseException) -> CheckpointError | None:
    """The line for an error of the client, or of what it wraps; ``None`` for any other."""
    import httpx2
    from huggingface_hub import errors

    for one in causes(error):
        if isinstance(one, CheckpointError):
            return one
    for one in causes(error):
        if isinstance(one, errors.HfHubHTTPError):
            return CheckpointError(_answer(repo, one), "output")
        if isinstance(one, errors.OfflineModeIsEnabled):
            return _output(f"{repo}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it")
        if isinstance(one, errors.LocalTokenNotFoundError):
            return _output(f"{repo}: no login was found; {LOGIN}")
        if isinstance(one, errors.HFValidationError):
            return CheckpointError(f"{repo}: {_plain(one)}", "refused")
        if isinstance(one, httpx2.TransportError):
            what = f"cannot reach the Hub ({type(one).__name__}: {_plain(one)})"
            return _output(f"{repo}: {what}; when the network is back, {AGAIN}")
    for one in causes(error):
        if isinstance(one, OSError) and one.filename and one.strerror:
            return _output(f"{one.filename}: {one.strerror}; {AGAIN}")
    if _is_clients(error):
        return _output(f"{repo}: the Hub's client gave up ({_plain(error)}); {AGAIN}")
    return None


def xet_failed(repo: str, error: BaseException) -> CheckpointError:
    """The line for an error of hf_xet."""
    line = (
        f"{repo}: the Xet upload failed ({_plain(error)}); {AGAIN}; --transport lfs is another way"
    )
    return _output(line)


def _is_clients(error: BaseException) -> bool:
    """Whether the error was raised in a module of the client."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(name).split(".")[0] in ("huggingface_hub", "hf_xet")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _output(line: str) -> CheckpointError:
    return CheckpointError(line, "output")


def _plain(error: BaseException) -> str:
    """The first line of an error's text, without the token should it stand there."""
    from huggingface_hub import get_token

    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    token = get_token()
    return (lines[0].replace(token, "...") if token else lines[0])[:LONGEST]


def _answer(repo: str, error: BaseException) -> str:
    """What to do about an answer of the Hub."""
    from huggingface_hub import errors

    number = status(error)
    words = " ".join(str(getattr(error, "server_message", None) or "").split())[:LONGEST]
    quoted = f' ("{words}")' if words else ""
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated; ask for access on its page"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision; see its branches, or name another"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo} is not there, or not for this login{quoted}; check the name, and {LOGIN}"
    if number == 401:
        return f"{repo}: the Hub does not accept this login{quoted}; {LOGIN}"
    if number == 403:
        return (
            f"{repo}: the Hub refuses this{quoted}; if storage is not the matter, the login needs "
            "write access to it"
        )
    if number == 402:
        return f"{repo}: the Hub asks for payment{quoted}"
    if number == 412:
        return f"{repo} was changed by somebody else meanwhile; nothing was changed, push again"
    if number == 413:
        return f"{repo}: too much for one request{quoted}; take a larger --max-shard-size"
    if number == 429:
        return f"{repo}: the Hub still limits the rate after several tries; later {AGAIN}"
    if number is not None and number >= 500:
        return f"{repo}: the Hub answers {number} after several tries{quoted}; later {AGAIN}"
    return f"{repo}: the Hub answers {number}{quoted}"
