"""A rank's state as files, without pickle where it is ours.

torch_file  what ``torch.save`` would write, captured now and written later
distcp_file  a rank's file of a distributed checkpoint of torch; state_file: what both are
blocks      its bytes, hashed by one thread and written by another
plain       nested state as a safetensors file;  plain_reading: what is in one
plain_file  such a file, captured now and written later
rng         random generators
rank_files  what resuming needs beside DeepSpeed's files
jsonable    values as JSON
"""
