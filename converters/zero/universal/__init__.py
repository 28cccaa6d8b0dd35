"""DeepSpeed's universal format.

reader             a universal folder as the checkpoint it was made from
source             the same as a ``Source``, for ``detect``
parameter_folders  the files of a parameter
group_layouts      whose parameters the param groups are, and in what order
plan               to the format and back, as plans of files
proof              the files read again and compared with the source
"""
