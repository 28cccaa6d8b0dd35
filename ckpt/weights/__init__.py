"""From the tensors of a checkpoint to a folder that its reader loads.

request     what a user asks for
companions  the files beside weights
output      what will be written, as a value
reader      who reads it: the classes of transformers, and their names
naming      names of tensors
layouts     names and shapes as save_pretrained writes them
adapters, merge  PEFT: the adapter's folder, or the model with the adapter in it
check       does the output load?
conversion  all of it, as ``ckpt to-fp32`` does it
opening     ``ckpt.open`` and its like
arguments   errors that name Python's arguments, not options
parts       several models that were saved as one
advice      remedies that several messages name
absences, quantized_facts  what a reader is told of missing and of quantized weights
"""
