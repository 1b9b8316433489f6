/* Preloaded into a run: at the N-th change of a file below KD_FAULT_UNDER the process is killed in the middle of it
 * (KD_FAULT=kill:N), or the disk is full from then on (KD_FAULT=full:N). Both tear the write in half. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static long *seen;  /* shared with the children, so that the parent can read what a child has counted */

__attribute__((constructor)) static void start(void) {
    seen = mmap(NULL, sizeof *seen, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

long faults_seen(void) { return *seen; }
void faults_reset(void) { *seen = 0; }

static int below(const char *path) {
    const char *root = getenv("KD_FAULT_UNDER");
    return root && strncmp(path, root, strlen(root)) == 0;
}

static int open_below(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

/* 0: go on. 1: the disk is full, from now on. 2: full, from this very call on. Kills outright unless `torn`. */
static int fault(int grows, int *torn) {
    long now = __sync_add_and_fetch(seen, 1);
    const char *mode = getenv("KD_FAULT");
    if (!mode) return 0;
    long at = atol(mode + 5);
    if (!strncmp(mode, "kill:", 5) && now == at) {
        if (torn) { *torn = 1; return 2; }
        kill(getpid(), SIGKILL);
    }
    if (!strncmp(mode, "full:", 5) && grows && now >= at) return now == at ? 2 : 1;
    return 0;
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define WRITER(name, arguments, half)                                   \
    int dies = 0, full = open_below(fd) ? fault(1, &dies) : 0;          \
    if (full == 2) half;                                                \
    if (dies) kill(getpid(), SIGKILL);                                  \
    if (full) { errno = ENOSPC; return -1; }                            \
    return real arguments

ssize_t write(int fd, const void *data, size_t count) {
    REAL(write);
    WRITER(write, (fd, data, count), (void)!real(fd, data, count / 2));
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t offset) {
    REAL(pwrite);
    WRITER(pwrite, (fd, data, count, offset), (void)!real(fd, data, count / 2, offset));
}

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t offset) {
    REAL(pwrite64);
    WRITER(pwrite64, (fd, data, count, offset), (void)!real(fd, data, count / 2, offset));
}

int posix_fallocate(int fd, off_t offset, off_t length) {
    REAL(posix_fallocate);
    if (open_below(fd) && fault(1, NULL)) return ENOSPC;
    return real(fd, offset, length);
}

int posix_fallocate64(int fd, off64_t offset, off64_t length) {
    REAL(posix_fallocate64);
    if (open_below(fd) && fault(1, NULL)) return ENOSPC;
    return real(fd, offset, length);
}

int fsync(int fd) {
    REAL(fsync);
    if (open_below(fd)) fault(0, NULL);
    return real(fd);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    if (below(to)) fault(0, NULL);
    return real(from, to);
}

int link(const char *from, const char *to) {
    REAL(link);
    if (below(to)) fault(0, NULL);
    return real(from, to);
}

int unlink(const char *path) {
    REAL(unlink);
    if (below(path)) fault(0, NULL);
    return real(path);
}
