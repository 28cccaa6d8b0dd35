/* An LD_PRELOAD library that counts a process's file operations below a folder and, at one of them,
 * does what disks, full filesystems and killed processes do.
 *
 *     FAULT_ROOT   the folder; nothing outside it is counted       FAULT_RANK  only where $RANK is this
 *     FAULT_ARM    a path: a process starts to count when it opens or looks for it, else at once
 *     FAULT_AT     the number of the operation, from 1; 0 counts and does nothing
 *     FAULT_DO     kill | killgroup | torn | torngroup | term | stop | stopgroup | enospc | edquot | eio | erofs |
 *                  fsync | eintr | short
 *     FAULT_STICKY 1: the error stays, as that of a full disk does
 *     FAULT_LOG    a file: one line for every operation counted:
 *                  NUMBER RANK NANOSECONDS CALL BYTES INODE PATH
 *                  (CALL! was not let through; inode 0: it was called with a path)
 *     FAULT_READS  1: opening for reading and reading are operations too; 2: and looking (stat,
 *                  opendir)
 *     FAULT_TRACE  a file: what changed below the folder, with the data (hardening/crash/trace.py)
 *
 * `torn` writes half of what it was asked to and then kills; at another kind of operation it is
 * `kill`, which acts instead of the operation. `enospc` and `edquot` fail what takes space, `eio`
 * and `erofs` (a read-only filesystem, if sticky) anything, `fsync` the first fsync or fdatasync
 * from FAULT_AT on, with EIO. `...group` kills the process group: all ranks, if they were started in
 * one. `term` is SIGTERM, `stop` SIGSTOP before the operation, which is done after SIGCONT. `eintr`
 * fails, with EINTR, the first call from FAULT_AT on that a signal may interrupt; `short` has the
 * first read or write of more than a byte do half of it and say so.
 *
 * The trace is written by every process under one lock, held from before an operation until it is in
 * the trace, so that its order is that in which the filesystem saw them. One entry:
 *     CALL INODE NUMBER LENGTH LENGTH LENGTH\n and then two paths and the data, of these lengths
 *
 * A process that was forked sets the same by fault_set(), and fault_count() says how far it is.
 * Not seen: io_uring, mappings, system calls made without libc, stdio inside libc after fopen.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, KILL, TORN, TERM, STOP, FULL, BAD, SYNC, INTERRUPTED, SHORT };
enum { SPACE = 1, DURABLE = 2, SLOW = 4, MOVES = 8 }; /* what kind of operation it is */
enum { HALF_THEN_DIE = 1, DIE = 2, HALF = 3 };        /* what is to happen at it */

static char root[PATH_MAX], arm[PATH_MAX];
static size_t root_length;
static atomic_int armed, number, action;
static int at, sticky, group, wanted_errno, reads, log_fd = -1, trace_fd = -1;
static pthread_mutex_t tracing = PTHREAD_MUTEX_INITIALIZER;
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
    if (!strcmp(what, "erofs")) chosen = BAD, wanted_errno = EROFS;
    if (!strcmp(what, "fsync")) chosen = SYNC;
    if (!strcmp(what, "term")) chosen = TERM;
    if (!strncmp(what, "stop", 4)) chosen = STOP;
    if (!strcmp(what, "eintr")) chosen = INTERRUPTED, wanted_errno = EINTR;
    if (!strcmp(what, "short")) chosen = SHORT;
    atomic_store(&action, at > 0 ? chosen : NONE);
    if (log_fd >= 0) close(log_fd), log_fd = -1;
    if (*journal) log_fd = open(journal, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    atomic_store(&number, 0);
    atomic_store(&armed, on);
}

int fault_count(void) { return atomic_load(&number); }
void fault_reads(int which) { reads = which; }
void fault_trace(const char *path) {
    if (trace_fd >= 0) close(trace_fd), trace_fd = -1;
    if (*path) trace_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

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
    fault_reads(atoi(variable("FAULT_READS")));
    fault_trace(variable("FAULT_TRACE"));
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

/* What is to happen at an operation: 0 nothing, HALF_THEN_DIE, DIE, HALF, -1 an error. */
static int decide(int mine, long long bytes, int kind) {
    int todo = atomic_load(&action);
    if (todo == NONE || mine < at) return 0;
    if (todo == TERM && mine == at) kill(group ? 0 : getpid(), SIGTERM);
    if (todo == STOP && mine == at) kill(group ? 0 : getpid(), SIGSTOP);
    if (todo == TERM || todo == STOP) return 0;
    if (todo == KILL || todo == TORN)
        return mine != at ? 0 : todo == TORN && bytes > 1 && kind & SPACE ? HALF_THEN_DIE : DIE;
    if (todo == FULL && !(kind & SPACE)) return 0;
    if (todo == SYNC && !(kind & DURABLE)) return 0;
    if (todo == INTERRUPTED && !(kind & SLOW)) return 0;
    if (todo == SHORT && !(kind & MOVES && bytes > 1)) return 0;
    if (!sticky) atomic_store(&action, NONE);
    return todo == SHORT ? HALF : -1;
}

/* Counts an operation. -1: it has to fail, errno is set; HALF..: do half, and then maybe die(). */
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
    if (what == DIE) die();
    if (what < 0) errno = wanted_errno;
    return what;
}

/* From here to traced() no other thread or process changes anything; whether there is a trace. */
static int trace(int inside) {
    if (!inside || trace_fd < 0) return 0;
    pthread_mutex_lock(&tracing);
    flock(trace_fd, LOCK_EX);
    return 1;
}

/* Ends what trace() began; with a call, which was done, writes it down. Leaves errno alone. */
static void traced(const char *call, unsigned long long inode, long long value, const char *path,
                   const char *other, const struct iovec *parts, int length, size_t bytes) {
    int before = errno;
    if (call) {
        char head[200];
        struct iovec all[length + 3];
        int used = 3;
        size_t left = bytes;
        all[1] = (struct iovec){(char *)path, strlen(path)};
        all[2] = (struct iovec){(char *)other, strlen(other)};
        for (int index = 0; index < length && left; index++) {
            size_t take = parts[index].iov_len < left ? parts[index].iov_len : left;
            all[used++] = (struct iovec){parts[index].iov_base, take};
            left -= take;
        }
        all[0].iov_base = head;
        all[0].iov_len = snprintf(head, sizeof head, "%s %llu %lld %zu %zu %zu\n", call, inode,
                                  value, strlen(path), strlen(other), bytes);
        if (syscall(SYS_writev, trace_fd, all, used) < (long)bytes) abort();
    }
    flock(trace_fd, LOCK_UN);
    pthread_mutex_unlock(&tracing);
    errno = before;
}

static unsigned long long inode_of(int fd) {
    struct stat held;
    return fstat(fd, &held) ? 0 : held.st_ino;
}

static unsigned long long inode_at(const char *path) {
    struct stat held;
    return fstatat(AT_FDCWD, path, &held, AT_SYMLINK_NOFOLLOW) ? 0 : held.st_ino;
}

static void traced_write(int fd, long long offset, ssize_t done, const struct iovec *parts,
                         int length) {
    int wrote = done > 0;
    traced(wrote ? "write" : NULL, inode_of(fd), offset, "", "", parts, length, wrote ? done : 0);
}

/* Where a write without an offset goes to. */
static long long place(int fd) {
    struct stat held;
    if (fcntl(fd, F_GETFL) & O_APPEND) return fstat(fd, &held) ? 0 : held.st_size;
    return lseek(fd, 0, SEEK_CUR);
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
        if (!writes(flags)) { \
            IN_PATH(folder, path); \
            inside = inside && reads; \
            COUNT("open-", 0, SLOW); \
            return real(__VA_ARGS__, mode); \
        } \
        IN_PATH(folder, path); \
        COUNT("open", 0, SLOW | (flags & O_CREAT ? SPACE : 0)); \
        return opened(trace(inside), whole, flags, real, __VA_ARGS__, mode); \
    }
#define opened(tracing, whole, flags, real, ...) \
    ({ \
        struct stat was; \
        int on = tracing, there = on && !fstatat(AT_FDCWD, whole, &was, 0); \
        int made = real(__VA_ARGS__); \
        if (on) { \
            const char *did = made < 0 ? NULL : there ? "truncate" : "create"; \
            if (there && !(flags & O_TRUNC && was.st_size)) did = NULL; \
            traced(did, made < 0 ? 0 : inode_of(made), 0, whole, "", NULL, 0, 0); \
        } \
        made; \
    })
OPEN(open, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPEN(openat, folder, (int folder, const char *path, int flags, ...), folder, path, flags)
OPEN(openat64, folder, (int folder, const char *path, int flags, ...), folder, path, flags)

#define CREAT(name) \
    int name(const char *path, mode_t mode) { \
        REAL(name); \
        IN_PATH(AT_FDCWD, path); \
        COUNT("open", 0, SLOW | SPACE); \
        return opened(trace(inside), whole, O_TRUNC, real, path, mode); \
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
    COUNT("write", size, SPACE | SLOW | MOVES);
    if (half == HALF_THEN_DIE) real(fd, data, size / 2), die();
    if (half == HALF) size /= 2;
    if (!trace(inside)) return real(fd, data, size);
    long long offset = place(fd);
    ssize_t done = real(fd, data, size);
    traced_write(fd, offset, done, &(struct iovec){(void *)data, size}, 1);
    return done;
}

#define PWRITE(name, type) \
    ssize_t name(int fd, const void *data, size_t size, type offset) { \
        REAL(name); \
        IN_FD(fd); \
        COUNT("pwrite", size, SPACE | SLOW | MOVES); \
        if (half == HALF_THEN_DIE) real(fd, data, size / 2, offset), die(); \
        if (half == HALF) size /= 2; \
        int on = trace(inside); \
        ssize_t done = real(fd, data, size, offset); \
        if (on) traced_write(fd, offset, done, &(struct iovec){(void *)data, size}, 1); \
        return done; \
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

#define WRITEV(name, call, where, more, ...) \
    ssize_t name(int fd, const struct iovec *parts, int length more) { \
        REAL(name); \
        IN_FD(fd); \
        COUNT(call, bytes_of(parts, length), SPACE | SLOW | MOVES); \
        struct iovec one; \
        if (half) parts = halved(parts, &length, &one); \
        if (half == HALF_THEN_DIE) real(fd, parts, length __VA_ARGS__), die(); \
        int on = trace(inside); \
        long long from = on ? where : 0; \
        ssize_t done = real(fd, parts, length __VA_ARGS__); \
        if (on) traced_write(fd, from, done, parts, length); \
        return done; \
    }
#define AND ,
WRITEV(writev, "writev", place(fd), , )
WRITEV(pwritev, "pwritev", offset, AND off_t offset, AND offset)
WRITEV(pwritev64, "pwritev", offset, AND off64_t offset, AND offset)
WRITEV(pwritev2, "pwritev", offset, AND off_t offset AND int flags, AND offset AND flags)
WRITEV(pwritev64v2, "pwritev", offset, AND off64_t offset AND int flags, AND offset AND flags)

/* Reads are counted only where that was asked for. */
#define READ(name, call, bytes, more, parameters, ...) \
    ssize_t name parameters { \
        REAL(name); \
        if (!reads) return real(__VA_ARGS__); \
        IN_FD(fd); \
        COUNT(call, bytes, SLOW | MOVES); \
        struct iovec one; \
        (void)one; \
        if (half == HALF) more; \
        return real(__VA_ARGS__); \
    }
READ(read, "read", size, size /= 2, (int fd, void *data, size_t size), fd, data, size)
READ(pread, "pread", size, size /= 2, (int fd, void *data, size_t size, off_t offset), fd, data,
     size, offset)
READ(pread64, "pread", size, size /= 2, (int fd, void *data, size_t size, off64_t offset), fd, data,
     size, offset)
READ(readv, "readv", bytes_of(parts, length), parts = halved(parts, &length, &one),
     (int fd, const struct iovec *parts, int length), fd, parts, length)
READ(preadv, "preadv", bytes_of(parts, length), parts = halved(parts, &length, &one),
     (int fd, const struct iovec *parts, int length, off_t offset), fd, parts, length, offset)
READ(preadv64, "preadv", bytes_of(parts, length), parts = halved(parts, &length, &one),
     (int fd, const struct iovec *parts, int length, off64_t offset), fd, parts, length, offset)
READ(preadv2, "preadv", bytes_of(parts, length), parts = halved(parts, &length, &one),
     (int fd, const struct iovec *parts, int length, off_t offset, int flags), fd, parts, length,
     offset, flags)
READ(preadv64v2, "preadv", bytes_of(parts, length), parts = halved(parts, &length, &one),
     (int fd, const struct iovec *parts, int length, off64_t offset, int flags), fd, parts, length,
     offset, flags)

#define SENDFILE(name, type) \
    ssize_t name(int fd, int from, type *offset, size_t size) { \
        REAL(name); \
        IN_FD(fd); \
        COUNT("sendfile", size, SPACE | SLOW | MOVES); \
        if (half == HALF_THEN_DIE) real(fd, from, offset, size / 2), die(); \
        if (half == HALF) size /= 2; \
        if (inside && trace_fd >= 0) return errno = ENOSYS, -1; /* then they write() */ \
        return real(fd, from, offset, size); \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int from, off64_t *at_from, int fd, off64_t *at_to, size_t size,
                        unsigned flags) {
    REAL(copy_file_range);
    IN_FD(fd);
    COUNT("copy_file_range", size, SPACE | SLOW | MOVES);
    if (half == HALF_THEN_DIE) real(from, at_from, fd, at_to, size / 2, flags), die();
    if (half == HALF) size /= 2;
    if (inside && trace_fd >= 0) return errno = ENOSYS, -1; /* then they write() */
    return real(from, at_from, fd, at_to, size, flags);
}

/* What is traced: a truncation as the size, an allocation as the size that it extends to. */
#define ON_FD(name, call, kind, did, value, parameters, ...) \
    int name parameters { \
        REAL(name); \
        IN_FD(fd); \
        COUNT(call, 0, kind); \
        int on = trace(inside), done = real(__VA_ARGS__); \
        if (on) traced(done ? NULL : did, inode_of(fd), value, "", "", NULL, 0, 0); \
        return done; \
    }
ON_FD(ftruncate, "truncate", SPACE | SLOW, "truncate", size, (int fd, off_t size), fd, size)
ON_FD(ftruncate64, "truncate", SPACE | SLOW, "truncate", size, (int fd, off64_t size), fd, size)
ON_FD(fallocate, "fallocate", SPACE | SLOW, mode ? NULL : "extend", start + size,
      (int fd, int mode, off_t start, off_t size), fd, mode, start, size)
ON_FD(fallocate64, "fallocate", SPACE | SLOW, mode ? NULL : "extend", start + size,
      (int fd, int mode, off64_t start, off64_t size), fd, mode, start, size)
ON_FD(fsync, "fsync", DURABLE | SLOW, "sync", 0, (int fd), fd)
ON_FD(fdatasync, "fsync", DURABLE | SLOW, "sync", 0, (int fd), fd)
ON_FD(sync_file_range, "sync_file_range", DURABLE, NULL, 0,
      (int fd, off64_t start, off64_t size, unsigned flags), fd, start, size, flags)
ON_FD(fchmod, "chmod", 0, NULL, 0, (int fd, mode_t mode), fd, mode)

/* posix_fallocate returns the error and leaves errno alone. */
#define FALLOCATE(name, type) \
    int name(int fd, type start, type size) { \
        REAL(name); \
        IN_FD(fd); \
        if (inside && count("fallocate", whole, number_of, 0, SPACE | SLOW) < 0) return errno; \
        int on = trace(inside), failed = real(fd, start, size); \
        if (on) traced(failed ? NULL : "extend", inode_of(fd), start + size, "", "", NULL, 0, 0); \
        return failed; \
    }
FALLOCATE(posix_fallocate, off_t)
FALLOCATE(posix_fallocate64, off64_t)

#define ON_PATH(name, call, kind, folder, path, parameters, ...) \
    int name parameters { \
        REAL(name); \
        IN_PATH(folder, path); \
        COUNT(call, 0, kind); \
        int on = trace(inside), done = real(__VA_ARGS__); \
        if (on) traced(done ? NULL : call, inode_at(whole), 0, whole, "", NULL, 0, 0); \
        return done; \
    }
#define ON_TWO(name, call, value, kind, from_folder, from, folder, to, parameters, ...) \
    int name parameters { \
        REAL(name); \
        IN_PATH(folder, to); \
        COUNT(call, 0, kind); \
        char other[PATH_MAX] = ""; \
        int on = trace(inside), done = real(__VA_ARGS__); \
        if (on) { \
            below_at(from_folder, from, other); \
            traced(done ? NULL : call, inode_at(whole), value, whole, other, NULL, 0, 0); \
        } \
        return done; \
    }
ON_TWO(rename, "rename", 0, 0, AT_FDCWD, from, AT_FDCWD, to, (const char *from, const char *to),
       from, to)
ON_TWO(renameat, "rename", 0, 0, folder, from, to_folder, to,
       (int folder, const char *from, int to_folder, const char *to), folder, from, to_folder, to)
ON_TWO(renameat2, "rename", flags, 0, folder, from, to_folder, to,
       (int folder, const char *from, int to_folder, const char *to, unsigned flags), folder, from,
       to_folder, to, flags)
ON_TWO(link, "link", 0, SPACE, AT_FDCWD, from, AT_FDCWD, to, (const char *from, const char *to),
       from, to)
ON_TWO(linkat, "link", 0, SPACE, folder, from, to_folder, to,
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
ON_PATH(truncate, "truncate-path", SPACE, AT_FDCWD, path, (const char *path, off_t size), path, size)
ON_PATH(truncate64, "truncate-path", SPACE, AT_FDCWD, path, (const char *path, off64_t size), path,
        size)

/* Looking for a file arms as opening it does: os.path.exists() is enough, the file need not be. */
#define LOOK(name, call, folder, parameters, ...) \
    int name parameters { \
        REAL(name); \
        look(path); \
        if (reads < 2) return real(__VA_ARGS__); \
        IN_PATH(folder, path); \
        COUNT(call, 0, 0); \
        return real(__VA_ARGS__); \
    }
LOOK(stat, "stat", AT_FDCWD, (const char *restrict path, struct stat *restrict into), path, into)
LOOK(stat64, "stat", AT_FDCWD, (const char *restrict path, struct stat64 *restrict into), path, into)
LOOK(lstat, "stat", AT_FDCWD, (const char *restrict path, struct stat *restrict into), path, into)
LOOK(lstat64, "stat", AT_FDCWD, (const char *restrict path, struct stat64 *restrict into), path,
     into)
LOOK(access, "access", AT_FDCWD, (const char *path, int mode), path, mode)

DIR *opendir(const char *path) {
    REAL(opendir);
    if (reads < 2) return real(path);
    IN_PATH(AT_FDCWD, path);
    if (inside && count("opendir", whole, number_of, 0, 0) < 0) return NULL;
    return real(path);
}
