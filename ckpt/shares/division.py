"""How a command is divided among processes, and what of it this process does.

--share 3/16       one share, at any time; ``ckpt join`` follows when all are there
ckpt join OUT      no share: what others wrote becomes the output
torchrun, srun ..  one share each, at the same time; rank 0 joins and prints
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import CheckpointError
from converters.options import SHARE
from converters.plan import Plan

if TYPE_CHECKING:
    from ckpt.shares.company import Company
    from ckpt.shares.moving import Work
    from ckpt.shares.share_folder import SharedCommand
    from converters.execute.plan_shares import PlanShare, Volume
    from converters.execute.shares import ShareRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Divisible:
    """A command's work, as several processes do it, into ``output``.

    ``work`` is what is moved; asking for it raises ``CheckpointError`` where the output
    cannot be made. ``write_share`` takes a share, a progress and the command that every
    process was called with, and ``join`` makes the output of so many shares.
    """

    plan: Plan
    output: Path
    work: Callable[[], Work]
    write_share: Callable[[PlanShare, Callable[[int], Any], SharedCommand | None], ShareRecord]
    join: Callable[[int], Any]

    def nbytes_of(self, share: PlanShare) -> int:
        """Bytes that a share writes."""
        from converters.execute.plan_shares import DividedPlan

        return DividedPlan(self.plan, share.count).portions[share.number - 1].nbytes

    def volumes(self, share_count: int) -> Iterator[Volume]:
        """The bytes that each share reads and writes."""
        from converters.execute.plan_shares import DividedPlan

        return DividedPlan(self.plan, share_count).volumes()

    def missing_numbers(self, share_count: int) -> list[int]:
        """The shares that are not written yet."""
        from ckpt.shares import share_folder

        work = self.work()
        return share_folder.missing_shares(work.output, work.divided(share_count))

    def prepare(self, share_count: int, command: SharedCommand | None) -> int:
        """Empties the staging folder of other work; how many shares are there already."""
        from ckpt.shares import share_folder

        work = self.work()
        task = work.divided(share_count)
        share_folder.prepare(work.output, task, command)
        return share_count - len(share_folder.missing_shares(work.output, task))

    def require_joinable(self, place: Path) -> None:
        """``CheckpointError`` where ``joined`` would find shares missing."""
        from ckpt.shares import share_folder

        count = share_folder.count_of(place)
        share_folder.require_all(place, self.missing_numbers(count), count)

    def joined(self, place: Path) -> Any:
        """Joins the shares that lie at ``place``; ``CheckpointError`` if they are of another
        output."""
        from ckpt.shares import share_folder

        work = self.work()
        if work.output.absolute() != place:
            raise CheckpointError(
                f"{place}: its shares were written by a command that makes {work.output}; write "
                "them again",
                "output",
            )
        return self.join(share_folder.count_of(place))


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """What of a divided command this process does.

    ``share`` is what it writes, ``None`` where it joins what others wrote into
    ``output``. ``company`` are the others that are at work at the same time, and
    ``command`` what each was called with.
    """

    share: PlanShare | None = None
    company: Company | None = None
    output: Path | None = None
    command: SharedCommand | None = None

    @property
    def speaks(self) -> bool:
        """Whether this process prints what all of them have done."""
        return self.company is None or self.company.is_first

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """A block whose errors the other processes are told; at its end they part."""
        if self.company is None:
            yield
            return

        try:
            yield
        except SystemExit:
            raise  # a result with another exit code
        except BaseException as error:
            self.company.report(error)
            raise
        finally:
            self.company.leave()


def of_share(share: PlanShare, arguments: Sequence[str]) -> Division | None:
    """The division that a user gives by hand; ``None`` for the only share of one."""
    if share.count == 1:
        return None
    return Division(share=share, command=_command(arguments))


def of_launch(what: str, arguments: Sequence[str]) -> Division | None:
    """The division that the launcher of this process gives; ``None`` for a process alone.

    ``what`` is the command, such as "ckpt to-fp32". ``CheckpointError`` where the
    processes cannot find each other.
    """
    from ckpt.distributed import launchers
    from ckpt.shares import launch

    is_interactive = sys.stdin is not None and sys.stdin.isatty()
    launched = launch.launch_of(os.environ, launchers.ancestors(), is_interactive)
    if launched is None:
        return None

    from ckpt.shares.company import Company

    company = Company(launched, what)
    return Division(share=company.share, company=company, command=_command(arguments))


def _command(arguments: Sequence[str]) -> SharedCommand:
    """The arguments of a command without the share, and where it was called."""
    from ckpt.shares.share_folder import SharedCommand

    words: list[str] = []
    is_value, flag = False, SHARE.flag
    for word in arguments:
        if not is_value and word != flag and not word.startswith(f"{flag}="):
            words.append(word)
        is_value = word == flag

    return SharedCommand(tuple(words), str(Path.cwd()))
