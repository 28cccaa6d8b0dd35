"""From the parameters that were found in the files of all ranks to a ``Source``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from converters import quantized
from converters.source import Place, Source, SourceTopology
from converters.zero import checkpoint as zero
from converters.zero import optimizer_state
from converters.zero.files.state_files import State
from converters.zero.naming.assemble import Parameters, assemble

Partitions = Callable[[], Iterable[optimizer_state.Partition]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The checkpoint that the files of all ranks stand for.

    ``model`` is the first model file, ``module`` what the whole model's state dict would
    be. ``states`` are all files that tensors lie in. ``kind`` is the row of
    ``converters.detect``.
    """

    kind: str
    place: Place
    model: State
    module: Mapping[str, object]
    parameters: Parameters
    states: Sequence[State]
    topology: SourceTopology

    def source(self, partitions: Partitions | None = None) -> Source:
        """The same as a ``Source``; ``partitions`` finds the optimizer's state by name."""
        model = with_module(self.model, self.module)
        weights = quantized.marked(assemble(model, self.parameters, self.states))
        step = model.root.get("global_steps")
        stage = self.topology.stage or 0

        def state_of(name: str) -> Mapping[str, optimizer_state.Value]:
            assert partitions is not None
            return optimizer_state.state_of(self.place.folder, weights, partitions(), name)

        return Source(
            kind=self.kind,
            place=self.place,
            topology=self.topology,
            optimizer=state_of if partitions is not None else None,
            precision=zero.precision(model, weights),
            step=step if isinstance(step, int) else None,
            version=model.version,
            files={state.path: state.file.digest for state in self.states},
            weights=weights,
            entries=model.root,
            notes=tuple(self.parameters.notes),
            without_frozen=zero.excludes_frozen(stage, model),
        )


def with_module(model: State, module: Mapping[str, object], **entries: object) -> State:
    """The model file as if it held these tensors, and these entries."""
    return State(model.file, {**model.root, **entries, "module": dict(module)})
