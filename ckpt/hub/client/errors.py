"""The refusals of the Hub and its client, as one line for whoever pushes.

Nothing of a request is repeated, so that no token and no signed address gets into a
message.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpt import requirements
from ckpt.hub.client.retry import connection_errors, status
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.options import MAX_SHARD_SIZE, TRANSPORT
from converters.storage.system import errnos

MAX_CHARACTERS = 300  # characters of the Hub's own words
AGAIN = "the same command goes on where it stopped"
_OS_ERROR = LazyPattern(r"\(os error (\d+)\)")  # how Rust ends the text of one
_DISK = errnos.numbers("EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES", "ENOENT")
LOGIN = "log in with hf auth login, or set HF_TOKEN"


def require_client() -> None:
    """``CheckpointError`` unless huggingface_hub is installed, and not too old."""
    requirements.require("a push or pull", "huggingface_hub")


def quiet() -> None:
    """Keeps the client from writing to stderr itself: bars,
    and warnings with addresses in them."""
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    logging.set_verbosity(40)  # errors only


@contextmanager
def naming_file(*places: object) -> Iterator[None]:
    """Has what the client says of a disk name the file that it worked on,
    or the folder of several.

    Python's errors of reading and writing name none, and hf_xet's are text.
    """
    try:
        yield
    except Exception as error:
        paths = [str(place) for place in places if isinstance(place, str | Path)]
        for cause in causes(error) if paths else ():
            if isinstance(cause, OSError) and cause.errno is not None:
                if cause.errno in _DISK and not cause.filename:
                    cause.filename = os.path.commonpath(paths)
            elif (match := _OS_ERROR.search(str(cause))) and (
                error_number := int(match[1])
            ) in _DISK:
                raise OSError(
                    error_number, os.strerror(error_number), os.path.commonpath(paths)
                ) from error

        raise


def interrupted(error: BaseException) -> bool:
    """Whether a signal came while hf_xet read a file: it gives up then,
    as Python does not."""
    matches = [_OS_ERROR.search(str(match)) for match in causes(error)]
    return any(match is not None and int(match[1]) == errno.EINTR for match in matches)


@contextmanager
def translate_errors(repo: str) -> Iterator[None]:
    """Turns what the client raises into ``CheckpointError``, and leaves everything else."""
    try:
        yield
    except Exception as error:
        if (reported_error := translated(repo, error)) is None:
            raise
        raise reported_error from error


def translated(repo: str, error: BaseException) -> CheckpointError | None:
    """The line for an error of the client, or of what it wraps; ``None`` for any other."""
    from huggingface_hub import errors

    for cause in causes(error):
        if isinstance(cause, CheckpointError):
            return cause

    for cause in causes(error):
        if isinstance(cause, errors.HfHubHTTPError):
            return CheckpointError(_advice(repo, cause), "output")
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return _output_error(
                f"{repo}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it"
            )

        if isinstance(cause, errors.LocalTokenNotFoundError):
            return _output_error(f"{repo}: no login was found; {LOGIN}")
        if isinstance(cause, errors.HFValidationError):
            return CheckpointError(f"{repo}: {_first_line(cause)}", "refused")
        if isinstance(cause, connection_errors()):
            problem = f"cannot reach the Hub ({type(cause).__name__}: {_first_line(cause)})"
            return _output_error(f"{repo}: {problem}; when the network is back, {AGAIN}")

    for cause in causes(error):
        if isinstance(cause, OSError) and cause.filename and cause.strerror:
            return _output_error(f"{cause.filename}: {cause.strerror}; {AGAIN}")

    if _is_clients(error):
        return _output_error(f"{repo}: the Hub's client gave up ({_first_line(error)}); {AGAIN}")

    return None


def xet_failed(repo: str, error: BaseException) -> CheckpointError:
    """The line for an error of hf_xet."""
    problem = f"the Xet upload failed ({_first_line(error)})"
    return _output_error(f"{repo}: {problem}; {AGAIN}; {TRANSPORT('lfs')} is another way")


def _is_clients(error: BaseException) -> bool:
    """Whether the error was raised in a module of the client."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module_name = traceback.tb_frame.f_globals.get("__name__", "") if traceback is not None else ""
    return str(module_name).split(".")[0] in ("huggingface_hub", "hf_xet")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _output_error(line: str) -> CheckpointError:
    return CheckpointError(line, "output")


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, without the token should it stand there."""
    from huggingface_hub import get_token

    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    login_token = get_token()
    return (lines[0].replace(login_token, "...") if login_token else lines[0])[:MAX_CHARACTERS]


def _advice(repo: str, error: BaseException) -> str:
    """The advice on an answer of the Hub."""
    from huggingface_hub import errors

    http_status = status(error)
    server_words = " ".join(str(getattr(error, "server_message", None) or "").split())[
        :MAX_CHARACTERS
    ]
    quoted = f' ("{server_words}")' if server_words else ""
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated; ask for access on its page"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision; see its branches, or name another"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo} is not there, or not for this login{quoted}; check the name, and {LOGIN}"
    if http_status == 401:
        return f"{repo}: the Hub does not accept this login{quoted}; {LOGIN}"
    if http_status == 403:
        return (
            f"{repo}: the Hub refuses this{quoted}; if storage is not the matter, the "
            "login needs write access to it"
        )

    if http_status == 402:
        return f"{repo}: the Hub asks for payment{quoted}"
    if http_status == 412:
        return f"{repo} was changed by somebody else meanwhile; nothing was changed, push again"
    if http_status == 413:
        return f"{repo}: too much for one request{quoted}; take a larger {MAX_SHARD_SIZE}"
    if http_status == 429:
        return f"{repo}: the Hub still limits the rate after several tries; later {AGAIN}"
    if http_status is not None and http_status >= 500:
        return f"{repo}: the Hub answers {http_status} after several tries{quoted}; later {AGAIN}"

    return f"{repo}: the Hub answers {http_status}{quoted}"
