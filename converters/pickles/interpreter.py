"""A pickle as inert data: its opcodes are interpreted, and nothing that a file names is
called."""

from __future__ import annotations

from typing import Any

from converters.errors import CheckpointError, MalformedError
from converters.pickles import nesting
from converters.pickles.machine import MARK, Machine
from converters.pickles.opcodes import OPCODES

_STOP = b"."[0]


class Interpreter(Machine):
    """Runs pickles that lie one after another in ``data``.

    ``builders`` maps (module, name) to the function that builds what a call of that
    global means; ``persistent`` gets what each persistent id names. ``where`` begins
    every error message.
    """

    def run(self) -> Any:
        """The next object. ``CheckpointError`` if the bytes are not a complete pickle."""
        self.stack, self.memo = [], {}
        data, end, handlers = self.data, len(self.data), OPCODES
        try:
            while self.position < end and (opcode := data[self.position]) != _STOP:
                self.position += 1
                if opcode not in handlers:
                    self.fail(f"opcode {bytes((opcode,))!r} is not one torch.save writes")
                handlers[opcode](self)
        except MalformedError as error:  # of a builder, which does not know the file
            self.fail(str(error))

        self.byte()  # the opcode that it ends with
        result = self.pop()
        if self.stack or result is MARK:
            self.fail("objects are left over")
        problem = nesting.wrong(result)
        if problem == nesting.IN_ITSELF:
            raise CheckpointError(
                f"{self.where}: its pickle holds {problem}, which ckpt does not read; save it "
                "again without that (torch.load reads it)",
                "unsupported",
            )
        if problem is not None:
            self.refuse_unnatural(f"its pickle holds {problem}")

        return result
