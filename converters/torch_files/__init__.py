"""Files of ``torch.save``, read and written as located tensors.

reader            a file by its first bytes: zip_format or legacy_format
torch_file        what reading gives
same_pickles      files with the same pickle: one of them is interpreted
zip_directory     a zip's directory, read strictly
zip_headers       the bytes around the records of a zip, as torch writes them
zip_writer        the zip as a plan
object_graph      the object as its pickle says it, to be written again
pickle_writer     inert data as a pickle: one for all that say the same
rebuild           what the pickles of torch name, as tensors located;  element_types  in tables
views             views into storages, as runs of bytes
odd_tensors       tensors that are no plain runs of elements
record_checksums  the records that tensors lie in
file_plan         an object graph as the plan of a file
"""
