"""Bytes to bytes: formats read as tensors located in files, and written by moving bytes.

tensors, extents  tensors located in files, and their bytes;  source  a checkpoint of them
tiles, walks     boxes of tensors, placed in a tensor, and the runs of bytes that they have;
                 chains  such tensors one after another
partitioned      tensors that ranks share equally;  rank_cuts  what a rank has of many
detect/          what lies at a path, and which reader fits it
zero/            DeepSpeed's state files;  dcp/  those of FSDP and torch's DCP
formats/         files of weights;  peft/  adapters
torch_files/     files of torch.save;  pickles/  read without running anything
names/           names chosen, changed and matched;  quantized/  weights that are codes
plan, cast       every byte of an output, decided;  computing/  tensors that a formula makes
execute/         plans carried out;  storage/  the door to bytes
errors, words    the one error, and lists and numbers in messages;  options  options in them
accessors        values of documents;  lazy_pattern  regular expressions, compiled when used
"""
