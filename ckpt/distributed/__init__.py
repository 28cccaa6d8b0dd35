"""The steps that ranks take together, and the objects that they share.

ranks         steps that all ranks take or none;  step  what a rank brings and gets
stores        the store that they speak through; rank_0_store moves it
launchers     what started them, and what it makes of signals
chunks        tensors from rank to rank
load_slots    loading in turns where memory is short
host_memory   how much memory there is
console       what a user sees where no logging is configured; importing the room sets it up
"""

from ckpt.distributed import console

console.attach()
