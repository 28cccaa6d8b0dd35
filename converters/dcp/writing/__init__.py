"""A training state as a distributed checkpoint of torch: what is written, byte by byte.

crossing_state  weights, optimizer states and options, of whatever checkpoint
without_zero    the groups of a training without ZeRO
torch_options   options that torch's optimizers have and DeepSpeed's lack
layouts         the keys that plain DCP, Accelerate and torchtitan have for them
folder          the files of a folder, and what lies where in them
items           a tensor, a number or an object as torch.save writes it
metadata        ``.metadata``, which says where everything is
proof           the finished files, traced back to the source
"""
