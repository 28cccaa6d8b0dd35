"""Pickles as inert data: opcodes are interpreted,
and nothing that a file names is called.

interpreter  runs pickles
machine      its stack and memo;  memo  which entries of that are asked for
pickle_bytes its bytes, taken one after another
opcodes      which of the machine's methods each opcode is
hot_opcodes  the same for those that pickles consist of, faster
values       what stays of classes, functions and calls
denylist     names that no honest checkpoint holds
nesting      limits on the depth and number of values
"""
