"""Detects what lies at a path, from names and headers alone, and which reader fits it.

detection      ``detect(path)``: the kind, why it is not converted, its reader;  ``read(path)``
kinds          the table, joined of the rows that follow;  kind  what a row has
deepspeed      rows and their signs;  sharded (FSDP, DCP, Megatron), weights, files, others
foreign        rows of what other libraries wrote
look           what a sign looks at
state_folders  the folders of DeepSpeed's state files;  filenames  all names of files
"""

from converters.detect.detection import Detection, detect, detect_weights, read

__all__ = ["Detection", "detect", "detect_weights", "read"]
