/* An LD_PRELOAD library that counts a process's file operations below a folder and, at one of them,
 * does what disks, full filesystems and killed processes do.
 *
 *     FAULT_ROOT   the folder; nothing outside it is counted       FAULT_RANK  only where $RANK is this
 *     FAULT_ARM    a path: a process starts to count when it opens or looks for it, else at once
 *     FAULT_AT     the number of the operation, from 1; 0 counts and does nothing
 *     FAULT_DO     kill | killgroup | torn | torngroup | enospc | edquot | eio | fsync
 *     FAULT_STICKY 1: the error stays, as that of a full disk does
 *     FAULT_LOG    a file: one line for every operation counted:
 *                  NUMBER RANK NANOSECONDS CALL BYTES INODE PATH
 *                  (CALL! was not let through; inode 0: it was called with a path)
 *
 * `torn` writes half of what it was asked to and then kills; at another kind of operation it is
 * `kill`, which acts instead of the operation. `enospc` and `edquot` fail what takes space, `eio`
 * anything, `fsync` the first fsync or fdatasync from FAULT_AT on, with EIO. `...group` kills the
 * process group: all ranks, if they were started in one.
 *
 * A process that was forked sets the same by fault_set(), and fault_count() says how far it is.
 * Not seen: io_uring, mappings, system calls made without libc, stdio inside libc after fopen.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, KILL, TORN, FULL, BAD, SYNC };
enum { SPACE = 1, DURABLE = 2 }; /* what kind of operation it is */

static char root[PATH_MAX], arm[PATH_MAX];
static size_t root_length;
static atomic_int armed, number, action;
static int at, sticky, group, wanted_errno, log_fd = -1;
static char rank[16];

void fault_set(const char *folder, int on, int number_at, const char *what, int stays,
               const char *who, const char *journal) {
    atomic_store(&armed, 0);
    char real[PATH_MAX];
    snprintf(root, sizeof root, "%s", realpath(folder, real) ? real : folder);
    root_length = strlen(root);
    snprintf(rank, sizeof rank, "%s", who);
    at = number_at, sticky = stays, group = strstr(what, "group") != NULL, wanted_errno = EIO;
    int chosen = NONE;
    if (!strncmp(what, "kill", 4)) chosen = KILL;
    if (!strncmp(what, "torn", 4)) chosen = TORN;
    if (!strcmp(what, "enospc")) chosen = FULL, wanted_errno = ENOSPC;
    if (!strcmp(what, "edquot")) chosen = FULL, wanted_errno = EDQUOT;
    if (!strcmp(what, "eio")) chosen = BAD;
    if (!strcmp(what, "fsync")) chosen = SYNC;
    atomic_store(&action, at > 0 ? chosen : NONE);
    if (log_fd >= 0) close(log_fd), log_fd = -1;
    if (*journal) log_fd = open(journal, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    atomic_store(&number, 0);
    atomic_store(&armed, on);
}

int fault_count(void) { return atomic_load(&number); }

static const char *variable(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

__attribute__((constructor)) static void start(void) {
    if (!*variable("FAULT_ROOT")) return;
    if (*variable("FAULT_RANK") && strcmp(variable("FAULT_RANK"), variable("RANK"))) return;
    snprintf(arm, sizeof arm, "%s", variable("FAULT_ARM"));
    fault_set(variable("FAULT_ROOT"), !*arm, atoi(variable("FAULT_AT")), variable("FAULT_DO"),
              atoi(variable("FAULT_STICKY")), variable("RANK"), variable("FAULT_LOG"));
}

/* Is the path below the folder? Relative ones are, if what they are relative to is. */
static int below(const char *path) {
    return !strncmp(path, root, root_length) && (!path[root_length] || path[root_length] == '/');
}

static int below_fd(int fd, char *path) {
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static int below_at(int folder, const char *path, char *whole) {
    size_t length = 0;
    if (!path) return 0;
    if (*path != '/') {
        if (folder == AT_FDCWD) {
            if (!getcwd(whole, PATH_MAX)) return 0;
        } else {
            below_fd(folder, whole);
        }
        length = strlen(whole);
        if (length + 1 < PATH_MAX) whole[length++] = '/';
    }
    snprintf(whole + length, PATH_MAX - length, "%s", path);
    return below(whole);
}

static void die(void) {
    kill(group ? 0 : getpid(), SIGKILL);
    for (;;) pause();
}

/* What is to happen at an operation: 0 nothing, 1 a kill after half of it, 2 a kill, -1 an error. */
static int decide(int mine, long long bytes, int kind) {
    int todo = atomic_load(&action);
    if (todo == NONE || mine < at) return 0;
    if (todo == KILL || todo == TORN) return mine != at ? 0 : todo == TORN && bytes > 1 ? 1 : 2;
    if (todo == FULL && !(kind & SPACE)) return 0;
    if (todo == SYNC && !(kind & DURABLE)) return 0;
    if (!sticky) atomic_store(&action, NONE);
    return -1;
}

/* Counts an operation. -1: it has to fail, errno is set; 1: do half of it, then call die(). */
static int count(const char *call, const char *path, int fd, long long bytes, int kind) {
    int mine = atomic_fetch_add(&number, 1) + 1;
    int what = decide(mine, bytes, kind);
    if (log_fd >= 0) {
        char line[PATH_MAX + 160];
        struct stat held = {0};
        struct timespec now;
        if (fd >= 0 && fstat(fd, &held)) held.st_ino = 0;
        clock_gettime(CLOCK_MONOTONIC, &now);
        int length = snprintf(line, sizeof line, "%d %s %lld %s%s %lld %llu %s\n", mine,
                              *rank ? rank : "-", now.tv_sec * 1000000000LL + now.tv_nsec, call,
                              what ? "!" : "", bytes, (unsigned long long)held.st_ino, path);
        if (length > (int)sizeof line) length = sizeof line;
        syscall(SYS_write, log_fd, line, length);
    }
    if (what == 2) die();
    if (what < 0) errno = wanted_errno;
    return what;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define IN_PATH(folder, path) \
    char whole[PATH_MAX]; \
    int number_of = -1, inside = atomic_load(&armed) && below_at(folder, path, whole)
#define IN_FD(fd) \
    char whole[PATH_MAX]; \
    int number_of = fd, inside = atomic_load(&armed) && below_fd(fd, whole)
#define COUNT(call, bytes, kind) \
    int half = inside ? count(call, whole, number_of, bytes, kind) : 0; \
    if (half < 0) return -1

static void look(const char *path) {
    if (*arm && path && !strcmp(path, arm)) atomic_store(&armed, 1);
}

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT; }

#define OPEN(name, folder, parameters, ...) \
    int name parameters { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        look(path); \
        if (writes(flags)) { \
            IN_PATH(folder, path); \
            COUNT("open", 0, flags &O_CREAT ? SPACE : 0); \
        } \
        return real(__VA_ARGS__, mode); \
    }
OPEN(open, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPEN(openat, folder, (int folder, const char *path, int flags, ...), folder, path, flags)
OPEN(openat64, folder, (int folder, const char *path, int flags, ...), folder, path, flags)

#define CREAT(name) \
    int name(const char *path, mode_t mode) { \
        REAL(name); \
        IN_PATH(AT_FDCWD, path); \
        COUNT("open", 0, SPACE); \
        return real(path, mode); \
    }
CREAT(creat)
CREAT(creat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        if (strpbrk(mode, "wa+")) { \
            IN_PATH(AT_FDCWD, path); \
            if (inside && count("open", whole, number_of, 0, SPACE) < 0) return NULL; \
        } \
        return real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    IN_FD(fd);
    COUNT("write", size, SPACE);
    if (half) real(fd, data, size / 2), die();
    return real(fd, data, size);
}

#define PWRITE(name, type) \
    ssize_t name(int fd, const void *data, size_t size, type offset) { \
        REAL(name); \
        IN_FD(fd); \
        COUNT("pwrite", size, SPACE); \
        if (half) real(fd, data, size / 2, offset), die(); \
        return real(fd, data, size, offset); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

static long long bytes_of(const struct iovec *parts, int length) {
    long long bytes = 0;
    for (int index = 0; index < length; index++) bytes += parts[index].iov_len;
    return bytes;
}

/* Half of a gathered write: half of the parts, or half of the only one. */
static struct iovec *halved(const struct iovec *parts, int *length, struct iovec *one) {
    *one = parts[0];
    if (*length > 1) return *length /= 2, (struct iovec *)parts;
    return one->iov_len /= 2, one;
}

#define WRITEV(name, call, more, ...) \
    ssize_t name(int fd, const struct iovec *parts, int length more) { \
        REAL(name); \
        IN_FD(fd); \
        COUNT(call, bytes_of(parts, length), SPACE); \
        if (half) { \
            struct iovec one, *some = halved(parts, &length, &one); \
            real(fd, some, length __VA_ARGS__), die(); \
        } \
        return real(fd, parts, length __VA_ARGS__); \
    }
#define AND ,
WRITEV(writev, "writev", , )
WRITEV(pwritev, "pwritev", AND off_t offset, AND offset)
WRITEV(pwritev64, "pwritev", AND off64_t offset, AND offset)
WRITEV(pwritev2, "pwritev", AND off_t offset AND int flags, AND offset AND flags)
WRITEV(pwritev64v2, "pwritev", AND off64_t offset AND int flags, AND offset AND flags)

#define SENDFILE(name, type) \
    ssize_t name(int fd, int from, type *offset, size_t size) { \
        REAL(name); \
        IN_FD(fd); \
        COUNT("sendfile", size, SPACE); \
        if (half) real(fd, from, offset, size / 2), die(); \
        return real(fd, from, offset, size); \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int from, off64_t *at_from, int fd, off64_t *at_to, size_t size,
                        unsigned flags) {
    REAL(copy_file_range);
    IN_FD(fd);
    COUNT("copy_file_range", size, SPACE);
    if (half) real(from, at_from, fd, at_to, size / 2, flags), die();
    return real(from, at_from, fd, at_to, size, flags);
}

#define ON_FD(name, call, kind, parameters, ...) \
    int name parameters { \
        REAL(name); \
        IN_FD(fd); \
        COUNT(call, 0, kind); \
        return real(__VA_ARGS__); \
    }
ON_FD(ftruncate, "truncate", SPACE, (int fd, off_t size), fd, size)
ON_FD(ftruncate64, "truncate", SPACE, (int fd, off64_t size), fd, size)
ON_FD(fallocate, "fallocate", SPACE, (int fd, int mode, off_t start, off_t size), fd, mode, start,
      size)
ON_FD(fallocate64, "fallocate", SPACE, (int fd, int mode, off64_t start, off64_t size), fd, mode,
      start, size)
ON_FD(fsync, "fsync", DURABLE, (int fd), fd)
ON_FD(fdatasync, "fsync", DURABLE, (int fd), fd)
ON_FD(sync_file_range, "sync_file_range", DURABLE,
      (int fd, off64_t start, off64_t size, unsigned flags), fd, start, size, flags)
ON_FD(fchmod, "chmod", 0, (int fd, mode_t mode), fd, mode)

/* posix_fallocate returns the error and leaves errno alone. */
#define FALLOCATE(name, type) \
    int name(int fd, type start, type size) { \
        REAL(name); \
        IN_FD(fd); \
        if (inside && count("fallocate", whole, number_of, 0, SPACE) < 0) return errno; \
        return real(fd, start, size); \
    }
FALLOCATE(posix_fallocate, off_t)
FALLOCATE(posix_fallocate64, off64_t)

#define ON_PATH(name, call, kind, folder, path, parameters, ...) \
    int name parameters { \
        REAL(name); \
        IN_PATH(folder, path); \
        COUNT(call, 0, kind); \
        return real(__VA_ARGS__); \
    }
ON_PATH(rename, "rename", 0, AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH(renameat, "rename", 0, to_folder, to,
        (int folder, const char *from, int to_folder, const char *to), folder, from, to_folder, to)
ON_PATH(renameat2, "rename", 0, to_folder, to,
        (int folder, const char *from, int to_folder, const char *to, unsigned flags), folder, from,
        to_folder, to, flags)
ON_PATH(link, "link", SPACE, AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH(linkat, "link", SPACE, to_folder, to,
        (int folder, const char *from, int to_folder, const char *to, int flags), folder, from,
        to_folder, to, flags)
ON_PATH(symlink, "symlink", SPACE, AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH(symlinkat, "symlink", SPACE, folder, to, (const char *from, int folder, const char *to), from,
        folder, to)
ON_PATH(unlink, "unlink", 0, AT_FDCWD, path, (const char *path), path)
ON_PATH(unlinkat, "unlink", 0, folder, path, (int folder, const char *path, int flags), folder, path,
        flags)
ON_PATH(remove, "unlink", 0, AT_FDCWD, path, (const char *path), path)
ON_PATH(mkdir, "mkdir", SPACE, AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
ON_PATH(mkdirat, "mkdir", SPACE, folder, path, (int folder, const char *path, mode_t mode), folder,
        path, mode)
ON_PATH(rmdir, "rmdir", 0, AT_FDCWD, path, (const char *path), path)
ON_PATH(chmod, "chmod", 0, AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
ON_PATH(truncate, "truncate", SPACE, AT_FDCWD, path, (const char *path, off_t size), path, size)
ON_PATH(truncate64, "truncate", SPACE, AT_FDCWD, path, (const char *path, off64_t size), path, size)

/* Looking for a file arms as opening it does: os.path.exists() is enough, the file need not be. */
int stat(const char *restrict path, struct stat *restrict into) {
    REAL(stat);
    look(path);
    return real(path, into);
}
int stat64(const char *restrict path, struct stat64 *restrict into) {
    REAL(stat64);
    look(path);
    return real(path, into);
}
int access(const char *path, int mode) {
    REAL(access);
    look(path);
    return real(path, mode);
}
