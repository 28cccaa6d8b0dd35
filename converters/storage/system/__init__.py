"""The services of operating systems: each need in one module,
and no question about it elsewhere.

errnos      numbers of errors, those that this system has
opening     descriptors, of files as bytes
offsets     reading and writing at an offset
fsync       on disk: files, folders, filesystems
flock       locks of files that end with the process
c_library   functions of the C library that Python does not have
memory      memory that is taken when it is written to
limits      how many files may be open
names       names that lead out of no folder
processes   clock, children and priority of processes

Linux has all of it. On macOS there is no fallocate(2), renameat2(2), syncfs(2),
posix_fadvise(2), no flags of pwritev(2), no /proc and no EREMOTEIO; each is a matter of
speed or has a substitute. On Windows, in addition, there is no flock(2), no pread(2), no
fsync(2) of folders, and an open file can be neither renamed nor removed. So there is
reading and converting; what deletes or commits in a run says that it needs locks
(``flock.require``).
"""
