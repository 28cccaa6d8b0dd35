"""A training of plain torch (FSDP2, DDP,
or one process) as a distributed checkpoint (DCP).

training    model, optimizer and scheduler as one, seen as the front ends see an engine
measured    the same, with the size that a save will have
leaves      its state dict, as torch's ``get_state_dict`` makes it
plain_values, nesting  what of it is no tensor, and how it was nested
boxes       which part of a tensor this rank has, and which rank writes it
capture     this rank's part of a save, taken down
description  ``.metadata`` from what all ranks say of theirs
model_tensors  the model's tensors as the live export takes an engine's
saved_states  the states in a folder, by name
model_entries, group_matching  what of the training each of them is
loading     a checkpoint into the training, by byte ranges, on any number of ranks
"""
