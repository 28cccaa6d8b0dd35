"""The proofs of the finished files of a crossing:
traced back by readers that know no plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt.rewrite.result import RewriteChecks
from converters.dcp.native import files as native_files
from converters.dcp.native.training import FsdpTraining
from converters.dcp.writing import proof
from converters.dcp.writing.folder import StateEntry
from converters.plan import Plan
from converters.zero.native import proof as retrace
from converters.zero.native.target import TargetTopology


@dataclass(frozen=True, slots=True)
class DcpProof:
    """Of torch's files:
    ``folders`` has the entries of each folder by its name in the output."""

    folders: Mapping[str, Sequence[StateEntry]]
    plan: Plan
    trained_count: int

    def verify(self, folder: Path) -> RewriteChecks:
        """Every tensor lies where the source has it, every other value is the same."""
        counts = proof.verify(self.folders, self.plan, folder)
        others = counts.weights - self.trained_count
        return _checks(self.trained_count, counts.states, others)

    def read_back(self, folder: Path) -> int:
        """Every tensor's record agrees with its CRC32."""
        return proof.read_back(self.folders, folder)


@dataclass(frozen=True, slots=True)
class NativeProof:
    """Of DeepSpeed's files."""

    training: FsdpTraining
    target: TargetTopology
    plan: Plan

    def verify(self, folder: Path) -> RewriteChecks:
        """Every tensor lies where the source has it, options and constants are the same."""
        counts = native_files.verify(self.training, self.target, self.plan, folder)
        return _checks(counts["parameters"], counts["states"], counts["others"], counts["copies"])

    def read_back(self, folder: Path) -> int:
        """Every storage agrees with its CRC32."""
        return retrace.read_back(self.plan, folder)


def _checks(parameters: int, states: int, others: int, copies: int = 0) -> RewriteChecks:
    """The proofs, before the bytes are counted."""
    return RewriteChecks(
        parameter_tensors=parameters,
        optimizer_tensors=states,
        other_tensors=others,
        reference_tensors=copies,
        crc32_bytes=0,
        no_crc32_bytes=0,
        read_back_bytes=0,
        verified=False,
    )
