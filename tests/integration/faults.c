/* Makes chosen system calls below a folder fail: preloaded into a process, which arms it through ctypes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { OPEN_READ = 1, OPEN_WRITE = 2, READ = 4, WRITE = 8, SYNC = 16, RENAME = 32, MKDIR = 64 };

static char folder[4096];
static long calls, first, last;
static unsigned kinds;
static int number;

/* Calls number `at` and the `count - 1` after it, of the kinds in `mask`, fail with `error`. */
void fault_arm(const char *below, long at, long count, int error, unsigned mask) {
  snprintf(folder, sizeof folder, "%s", below);
  calls = 0, first = at, last = at + count, kinds = mask, number = error;
}

long fault_disarm(void) {
  kinds = 0;
  return calls;
}

static int fails(unsigned kind, const char *path) {
  if (!(kinds & kind) || strncmp(path, folder, strlen(folder)) != 0) return 0;
  long now = ++calls;
  if (now < first || now >= last) return 0;
  errno = number;
  return 1;
}

static int fails_at(unsigned kind, int descriptor) {
  char link[64], path[4096];
  if (!(kinds & kind)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(kind, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                      \
  int name(const char *path, int flags, ...) {                          \
    va_list more;                                                       \
    va_start(more, flags);                                              \
    int mode = va_arg(more, int);                                       \
    va_end(more);                                                       \
    if (fails(flags & O_CREAT ? OPEN_WRITE : OPEN_READ, path)) return -1; \
    return REAL(name)(path, flags, mode);                               \
  }
OPEN(open)
OPEN(open64)

ssize_t read(int d, void *to, size_t n) { return fails_at(READ, d) ? -1 : REAL(read)(d, to, n); }
ssize_t pread64(int d, void *to, size_t n, off64_t at) { return fails_at(READ, d) ? -1 : REAL(pread64)(d, to, n, at); }
ssize_t write(int d, const void *from, size_t n) { return fails_at(WRITE, d) ? -1 : REAL(write)(d, from, n); }
ssize_t pwrite64(int d, const void *from, size_t n, off64_t at) {
  return fails_at(WRITE, d) ? -1 : REAL(pwrite64)(d, from, n, at);
}
int fsync(int d) { return fails_at(SYNC, d) ? -1 : REAL(fsync)(d); }
int rename(const char *from, const char *to) { return fails(RENAME, to) ? -1 : REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return fails(MKDIR, path) ? -1 : REAL(mkdir)(path, mode); }
