"""Checkpoints of FSDP and torch's distributed checkpoints (DCP), whoever saved them.

    .metadata      every tensor with its chunks: boxes of it, and the bytes that hold them
    __R_N.distcp   items one after another, each a file of torch.save of its own

reader            a folder of DCP as a ``Source``;  fsdp_folder  the folders of Accelerate;
                  parts  those of composer
checkpoint        what a ``Source`` of these formats has beside the weights
saved_state       the leaves of a state dict that was saved, whatever the files: of DCP
                  (dcp_state), of ``torch.save`` (torch_state), of a file for each rank of FSDP
                  (rank_files), of safetensors (safetensors_state)
metadata          ``.metadata``, of all ranks or of each;  entries/  what it is made of
items             the bytes of ``.distcp`` files, located;  item_forms  whether they are items
boxes             tensors put together from chunks
keys/             which leaves are the model's, which the optimizer's
optimizer_state   the optimizer's state by the names of parameters
ties              names of tensors that are stored twice
megatron          names of Megatron-Core, whose layers are stacked
writing/          a training state as such a checkpoint;  native/  back to DeepSpeed's files
"""
