"""Checkpoints of FSDP and torch's distributed checkpoints (DCP), whoever saved them.

    .metadata      every tensor with its chunks: boxes of it, and the bytes that hold them
    __R_N.distcp   items one after another, each a file of torch.save of its own

reader            what lies in a folder, as a ``Source``: the entry points
checkpoint        what a ``Source`` of these formats has beside the weights
saved_state       the leaves of a state dict that was saved, whatever the files
metadata          ``.metadata``, of all ranks or of each;  description  what it says
items             the bytes of ``.distcp`` files, located
boxes             tensors put together from chunks
layouts           which leaves are the model's, which the optimizer's
optimizer_state   the optimizer's state by the names of parameters
ties              names of tensors that are stored twice
rank_files        a file of FSDP for each rank;  torch_state  leaves of files of ``torch.save``
safetensors_state chunks in safetensors files
megatron          names of Megatron-Core, whose layers are stacked
writing/          a training state as such a checkpoint;  native/  back to DeepSpeed's files
"""
