"""DeepSpeed's universal format.

reader             a universal folder as the checkpoint it was made from
source             the same as a ``Source``, for ``detect``
model_files        which lie there;  merged_models  those of several model-parallel ranks as one
parameter_folders  the files of a parameter
group_layouts      whose parameters the param groups are, and in what order
expert_models      what its files say of AutoEP's experts
plan               to the format, as a plan of files
native_source      a folder as what native files are made from
same_weights       the evidence that it is of one save
proof              the files read again and compared with the source
"""
