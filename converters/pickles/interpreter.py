"""A pickle as inert data: its opcodes are interpreted,
and nothing that a file names is called."""

from __future__ import annotations

from struct import Struct
from typing import Any

from converters.errors import CheckpointError, MalformedError
from converters.pickles import nesting
from converters.pickles.hot_opcodes import HOT, TAIL_BYTES
from converters.pickles.machine import MARK, Machine
from converters.pickles.opcodes import OPCODES

_STOP, _GET, _LONG_GET, _U8 = b".hjK"
_U32 = Struct("<I").unpack_from


class Interpreter(Machine):
    """Runs pickles that lie one after another in ``data``.

    ``builders`` maps (module, name) to the function that builds what a call of that
    global means, and ``record_types`` to what its new objects without arguments are;
    ``persistent`` gets what each persistent id names. ``where`` begins every error
    message.
    """

    def run(self) -> Any:
        """The next object. ``CheckpointError`` if the bytes are not a complete pickle."""
        self.stack, self.memo = [], {}
        try:
            self._run_hot()
            self._run_all()
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

    def _run_hot(self) -> None:
        """Runs opcodes up to the last few bytes, or up to the end of the object."""
        data, position, end = self.data, self.position, len(self.data) - TAIL_BYTES
        memo, push, operations = self.memo, self.stack.append, HOT
        get, long_get, u8, u32 = _GET, _LONG_GET, _U8, _U32
        while position < end:
            opcode = data[position]
            operation = operations[opcode]
            if operation is not None:
                position = operation(self, position + 1)
            elif opcode == long_get and (index := u32(data, position + 1)[0]) in memo:
                push(memo[index])
                position += 5
            elif opcode == get and data[position + 1] in memo:
                push(memo[data[position + 1]])
                position += 2
            elif opcode == u8:
                push(data[position + 1])
                position += 2
            else:
                self.position = position
                if opcode == _STOP:
                    return
                self._run_one()
                position = self.position

        self.position = position

    def _run_all(self) -> None:
        """Runs opcodes up to the end of the object, or of the bytes."""
        while self.position < len(self.data) and self.data[self.position] != _STOP:
            self._run_one()

    def _run_one(self) -> None:
        opcode = self.data[self.position]
        self.position += 1
        if opcode not in OPCODES:
            self.fail(f"opcode {bytes((opcode,))!r} is not one torch.save writes")
        OPCODES[opcode](self)
