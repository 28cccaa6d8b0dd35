"""The door to bytes: reading, writing durably, and what may lie where a file should.

store            what a place that keeps files has to offer
stores           which store keeps a name, by its scheme;  url_path  a path that stays a URL
local_store      the local filesystem as one, and the durable renames that only it has
open_files       the files of a command, each opened and parsed once; files that threads share
file_part        a run of bytes of a file, as a file of its own;  compressed_items  unpacked
strided_reads    views whose runs are small and many
local            writes, renames and other calls of the operating system
syncing          on disk when the call returns, whatever the filesystem offers
checksums        CRC32s of pieces, joined to those of whole records
bounded_json     JSON that others wrote, read strictly and in bounded memory
settings_file    a small file of the user's, TOML or JSON
first_bytes      what a file is, whatever its name says
misplaced_files  a Git LFS pointer, a web page, an unfinished download in a file's place
system/          what operating systems offer, each need in one module
"""
