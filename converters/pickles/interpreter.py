"""A pickle as inert data: its opcodes are interpreted, and nothing that a file names is
called."""

from __future__ import annotations

import struct
from typing import Any

from converters.errors import MALFORMED
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
        data, handlers = self.data, OPCODES
        try:
            while (opcode := data[self.position]) != _STOP:
                self.position += 1
                if opcode not in handlers:
                    self.fail(f"opcode {bytes((opcode,))!r} is not one torch.save writes")
                handlers[opcode](self)
            self.position += 1
            result = self.stack.pop()
        except (RecursionError, struct.error) as error:
            self.fail(type(error).__name__)
        except MALFORMED as error:
            self.fail(f"{type(error).__name__} {error}")

        if self.stack or result is MARK:
            self.fail("objects are left over")
        if (problem := nesting.wrong(result)) is not None:
            self.refuse_unnatural(f"its pickle holds {problem}")

        return result
