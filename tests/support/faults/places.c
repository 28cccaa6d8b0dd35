/* An LD_PRELOAD library that makes the folders below PLACE_ROOT a filesystem that lacks something, as
 * FUSE, CIFS, object stores, overlayfs and NFS do. PLACE_LACKS is a comma list of
 *
 *     foldersync   fsync of a folder fails           (PLACE_ERRNO, default EINVAL)
 *     filesync     fsync of anything fails           (the same)
 *     folderrename rename of a folder fails          (PLACE_ERRNO, default EXDEV)
 *     filerename   rename of a file fails            (the same)
 *     exchange     renameat2 with flags fails        (EINVAL)
 *     map          mmap of a file fails              (ENODEV)
 *     lock         flock and fcntl locks fail        (ENOLCK)
 *     allocate     fallocate fails                   (EOPNOTSUPP)
 *     mode         chmod fails                       (EPERM)
 *     size         fstat, stat: a file is empty until it is PLACE_LATE ms old (default: for ever)
 *
 * PLACE_ASLEEP, read at the start: nothing of this until place_wake() is called, nor a look at the
 * environment, which another thread may be changing.
 *
 * PLACE_MATCH: of files, only those whose path has this in it. PLACE_RANK: only in the process with this $RANK. PLACE_LOG: a file, one line for each refusal, and
 * "syncfs" for each call of it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>



static int asleep;

__attribute__((constructor)) static void start(void) { asleep = getenv("PLACE_ASLEEP") != NULL; }

void place_wake(void) { asleep = 0; }

/* The folder, read anew at each call, as a test changes it; "" where nothing is lacking. */
static const char *root(void) {
    if (asleep) return "";
    const char *given = getenv("PLACE_ROOT"), *rank = getenv("PLACE_RANK"), *mine = getenv("RANK");
    return !given || (rank && (!mine || strcmp(rank, mine))) ? "" : given;
}

static int below(const char *path) {
    size_t length = strlen(root());
    const char *match = getenv("PLACE_MATCH");
    if (match && *match && !strstr(path, match)) return 0;
    return length && !strncmp(path, root(), length) && (!path[length] || path[length] == '/');
}

static int path_below(const char *path) {
    char whole[2 * PATH_MAX];
    if (!*root() || !path) return 0;
    if (*path == '/') return below(path);
    if (!getcwd(whole, PATH_MAX)) return 0;
    strcat(whole, "/");
    strncat(whole, path, PATH_MAX - 1);
    return below(whole);
}

static int fd_below(int fd) {
    char link[40], path[PATH_MAX];
    if (!*root()) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static int is_folder(const char *path) {
    struct statx held;
    return !syscall(SYS_statx, AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, STATX_TYPE, &held) &&
           S_ISDIR(held.stx_mode);
}

static int is_folder_fd(int fd) {
    struct statx held;
    return !syscall(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_TYPE, &held) && S_ISDIR(held.stx_mode);
}

static int lacks(const char *what) {
    const char *list = getenv("PLACE_LACKS");
    size_t length = strlen(what);
    for (const char *at = list; at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, what, length) && (!at[length] || at[length] == ',')) return 1;
    return 0;
}

static void note(const char *what) {
    const char *path = getenv("PLACE_LOG");
    if (!path) return;
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd < 0) return;
    (void)!write(fd, what, strlen(what));
    (void)!write(fd, "\n", 1);
    close(fd);
}

static int refuse(const char *what, int otherwise) {
    const char *given = getenv("PLACE_ERRNO");
    note(what);
    errno = given && otherwise > 0 ? atoi(given) : abs(otherwise);
    return -1;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define SYNC(name) \
    int name(int fd) { \
        REAL(name); \
        if (lacks("filesync") && fd_below(fd)) return refuse("filesync", EINVAL); \
        if (lacks("foldersync") && is_folder_fd(fd) && fd_below(fd)) \
            return refuse("foldersync", EINVAL); \
        return real(fd); \
    }
SYNC(fsync)
SYNC(fdatasync)

int syncfs(int fd) {
    REAL(syncfs);
    if (fd_below(fd)) note("syncfs");
    return real(fd);
}

static int no_rename(const char *from) {
    if (!path_below(from)) return 0;
    if (lacks("folderrename") && is_folder(from)) return 1;
    return lacks("filerename") && !is_folder(from);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return no_rename(from) ? refuse("rename", EXDEV) : real(from, to);
}

int renameat(int folder, const char *from, int to_folder, const char *to) {
    REAL(renameat);
    return no_rename(from) ? refuse("rename", EXDEV) : real(folder, from, to_folder, to);
}

int renameat2(int folder, const char *from, int to_folder, const char *to, unsigned flags) {
    REAL(renameat2);
    if (flags && lacks("exchange") && path_below(from)) return refuse("exchange", -EINVAL);
    if (no_rename(from)) return refuse("rename", EXDEV);
    return real(folder, from, to_folder, to, flags);
}

#define MAP(name, type) \
    void *name(void *at, size_t size, int access, int flags, int fd, type offset) { \
        REAL(name); \
        if (fd >= 0 && lacks("map") && fd_below(fd)) return refuse("map", -ENODEV), MAP_FAILED; \
        return real(at, size, access, flags, fd, offset); \
    }
MAP(mmap, off_t)
MAP(mmap64, off64_t)

int flock(int fd, int what) {
    REAL(flock);
    return lacks("lock") && fd_below(fd) ? refuse("lock", -ENOLCK) : real(fd, what);
}

#define ALLOCATE(name, type) \
    int name(int fd, int mode, type start, type size) { \
        REAL(name); \
        if (lacks("allocate") && fd_below(fd)) return refuse("allocate", -EOPNOTSUPP); \
        return real(fd, mode, start, size); \
    }
ALLOCATE(fallocate, off_t)
ALLOCATE(fallocate64, off64_t)

int chmod(const char *path, mode_t mode) {
    REAL(chmod);
    return lacks("mode") && path_below(path) ? refuse("mode", -EPERM) : real(path, mode);
}

int fchmod(int fd, mode_t mode) {
    REAL(fchmod);
    return lacks("mode") && fd_below(fd) ? refuse("mode", -EPERM) : real(fd, mode);
}

/* Whether the size of a file is not known yet. */
static int is_late(long long changed, long nanoseconds) {
    const char *late = getenv("PLACE_LATE");
    struct timespec now;
    if (!late) return 1;
    clock_gettime(CLOCK_REALTIME, &now);
    return (now.tv_sec - changed) * 1000 + (now.tv_nsec - nanoseconds) / 1000000 < atoi(late);
}

#define STALE(held, inside) \
    if (!done && S_ISREG((held)->st_mode) && (held)->st_size && lacks("size") && (inside) && \
        is_late((held)->st_ctim.tv_sec, (held)->st_ctim.tv_nsec)) \
        note("size"), (held)->st_size = 0; \
    return done
#define STAT(name, type) \
    int name(const char *restrict path, struct type *restrict held) { \
        REAL(name); \
        int done = real(path, held); \
        STALE(held, path_below(path)); \
    }
#define FSTAT(name, type) \
    int name(int fd, struct type *held) { \
        REAL(name); \
        int done = real(fd, held); \
        STALE(held, fd_below(fd)); \
    }
#define FSTATAT(name, type) \
    int name(int folder, const char *restrict path, struct type *restrict held, int flags) { \
        REAL(name); \
        int done = real(folder, path, held, flags); \
        STALE(held, path_below(path)); \
    }
STAT(stat, stat)
STAT(stat64, stat64)
FSTAT(fstat, stat)
FSTAT(fstat64, stat64)
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)
