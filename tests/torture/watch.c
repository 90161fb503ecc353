/* Watches what a process does to the files below one folder, for `python -m tests.torture` (disk.py reads the log).

   Preloaded (LD_PRELOAD) into the process that trains. Each call that changes a file or a folder below the root is
   done by the kernel as ever, and written down with its data, in order: what a disk would be told. A strike can be asked
   for at the n-th of them: the process is sent a signal just before that call. Nothing is watched before
   `torture_watch`; a process that is executed by this one is not watched.

   Calls are made by syscall(), so that none of these functions meets another. What stdio writes by itself is noted once
   it is closed; what is written through a mapping is not seen: disk.py compares what it knows with the folder after
   each process, and says so. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Shared with the process that has started this one; `Control` in watch.py has the same fields. */
struct control {
  int64_t phase;       /* where the run stands, written by the run's own markers */
  int64_t target;      /* the phase in which calls are counted; -1: all */
  int64_t at;          /* the strike comes before this call of the phase; 0: never */
  int64_t seen;        /* calls of that phase until now */
  int64_t calls;       /* calls of all phases until now */
  int64_t but_writes;  /* 1: of that phase, count the calls that are no writes of data */
  int64_t no_writes;   /* those of all phases until now */
  int64_t struck;      /* the number of the call before which the strike came; 0: not yet */
  int64_t signal;      /* what is sent */
  int64_t whom;        /* and to which of `pids` */
  int64_t busy;        /* threads that are between a call and its line in the log */
  int64_t pids[4];     /* the command, then its ranks */
  char what[256];      /* the call before which the strike came */
  /* Python's alone follow: watch.py. */
};

static struct control *control;
static int log_fd = -1;
static char root[PATH_MAX];
static size_t root_length;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

/* One line of the log: this head, then both names and the data. */
struct line {
  uint32_t size;       /* of the names and the data behind the head */
  uint8_t call;        /* a letter, see disk.py */
  uint8_t first, second; /* lengths of the names */
  uint8_t unused;
  uint64_t one, two;   /* inodes of folders or a file, or an offset: see disk.py */
};

static void unlocked_child(void) { pthread_mutex_init(&turn, NULL); }

int torture_watch(const char *folder, int log, struct control *shared) {
  static int once;
  if (!once++) pthread_atfork(NULL, NULL, unlocked_child);
  root_length = strlen(folder);
  memcpy(root, folder, root_length + 1);
  log_fd = log;
  control = shared;
  return 0;
}

static int below_root(const char *path) {
  return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == '\0');
}

static int path_of(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
  if (length < 0) return -1;
  path[length] = '\0';
  return 0;
}

/* Whether what `fd` is open on lies below the root; its inode, too. errno stays as it was. */
static int watched(int fd, uint64_t *inode, char *path) {
  int before = errno, found = 0;
  struct stat facts;
  if (control && path_of(fd, path) == 0 && below_root(path) && fstat(fd, &facts) == 0) {
    *inode = facts.st_ino;
    found = 1;
  }
  errno = before;
  return found;
}

/* The folder of a path: its inode, and the last name; 0 where that is not below the root. */
static int place(int at, const char *path, uint64_t *inode, char *name) {
  char folder[PATH_MAX], full[PATH_MAX];
  int before = errno, found = 0;
  if (!control || !path || strlen(path) >= sizeof folder) return 0;
  strcpy(folder, path);
  size_t length = strlen(folder);
  while (length > 1 && folder[length - 1] == '/') folder[--length] = '\0';
  char *slash = strrchr(folder, '/');
  const char *last = slash ? slash + 1 : folder;
  if (strlen(last) > 255) return 0;
  strcpy(name, last);
  const char *parent = !slash ? "." : slash == folder ? "/" : (*slash = '\0', folder);
  int fd = syscall(SYS_openat, at, parent, O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
  if (fd >= 0) {
    struct stat facts;
    if (path_of(fd, full) == 0 && below_root(full) && fstat(fd, &facts) == 0) {
      *inode = facts.st_ino;
      found = 1;
    }
    syscall(SYS_close, fd);
  }
  errno = before;
  return found;
}

static void begin(const char *call, const char *name) {
  __atomic_add_fetch(&control->busy, 1, __ATOMIC_SEQ_CST);
  pthread_mutex_lock(&turn);
  int64_t number = ++control->calls;
  int is_write = strcmp(call, "write") == 0;
  control->no_writes += !is_write;
  if (control->at && !control->struck && (control->target < 0 || control->target == control->phase) &&
      !(is_write && control->but_writes) && ++control->seen == control->at) {
    snprintf(control->what, sizeof control->what, "%s %s", call, name);
    control->struck = number;
    int before = errno;
    syscall(SYS_kill, (pid_t)control->pids[control->whom], (int)control->signal);
    errno = before;
  }
}

static void end(void) {
  pthread_mutex_unlock(&turn);
  __atomic_sub_fetch(&control->busy, 1, __ATOMIC_SEQ_CST);
}

static void note(char call, uint64_t one, uint64_t two, const char *first, const char *second,
                 const void *data, size_t size) {
  int before = errno;
  struct line line = {.call = (uint8_t)call, .one = one, .two = two};
  line.first = first ? (uint8_t)strlen(first) : 0;
  line.second = second ? (uint8_t)strlen(second) : 0;
  line.size = (uint32_t)(line.first + line.second + size);
  struct iovec parts[4] = {{&line, sizeof line}, {(void *)first, line.first}, {(void *)second, line.second},
                           {(void *)data, size}};
  syscall(SYS_writev, log_fd, parts, 4);
  errno = before;
}

/* Notes `size` bytes at `offset` of what `fd` is open on, read back from the file: from whatever call they came. */
static void note_data(int fd, uint64_t inode, off_t offset, ssize_t size) {
  static char block[1 << 16];
  char link[64];
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  int reading = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC, 0);
  while (reading >= 0 && size > 0) {
    ssize_t got = syscall(SYS_pread64, reading, block, size < (ssize_t)sizeof block ? size : (ssize_t)sizeof block, offset);
    if (got <= 0) break;
    note('W', inode, (uint64_t)offset, NULL, NULL, block, (size_t)got);
    offset += got;
    size -= got;
  }
  if (reading >= 0) syscall(SYS_close, reading);
  errno = before;
}

/* A call that writes where the file stands, and one that says where. */
#define WRITES(fd, call, text)                                                         \
  uint64_t inode;                                                                      \
  char path[PATH_MAX];                                                                 \
  if (!watched(fd, &inode, path)) return call;                                         \
  begin(text, path);                                                                   \
  ssize_t done = call;                                                                 \
  if (done > 0) note_data(fd, inode, syscall(SYS_lseek, fd, 0, SEEK_CUR) - done, done); \
  end();                                                                               \
  return done;
#define WRITES_AT(fd, call, offset, text)               \
  uint64_t inode;                                       \
  char path[PATH_MAX];                                  \
  if (!watched(fd, &inode, path)) return call;          \
  begin(text, path);                                    \
  ssize_t done = call;                                  \
  if (done > 0) note_data(fd, inode, offset, done);     \
  end();                                                \
  return done;

ssize_t write(int fd, const void *data, size_t size) { WRITES(fd, syscall(SYS_write, fd, data, size), "write") }
ssize_t writev(int fd, const struct iovec *parts, int count) {
  WRITES(fd, syscall(SYS_writev, fd, parts, count), "write")
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
  WRITES_AT(fd, syscall(SYS_pwrite64, fd, data, size, offset), offset, "write")
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return pwrite(fd, data, size, offset); }
ssize_t sendfile(int fd, int from, off_t *offset, size_t size) {
  WRITES(fd, syscall(SYS_sendfile, fd, from, offset, size), "write")
}
ssize_t sendfile64(int fd, int from, off64_t *offset, size_t size) { return sendfile(fd, from, (off_t *)offset, size); }
ssize_t copy_file_range(int from, off64_t *start, int fd, off64_t *offset, size_t size, unsigned flags) {
  if (offset) {
    errno = ENOSYS; /* who calls it falls back to write */
    return -1;
  }
  WRITES(fd, syscall(SYS_copy_file_range, from, start, fd, NULL, size, flags), "write")
}

/* numpy writes arrays by stdio: the whole file is noted as it is closed. */
int fclose(FILE *file) {
  static int (*real)(FILE *);
  uint64_t inode;
  char path[PATH_MAX];
  struct stat facts;
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "fclose");
  int fd = file ? fileno(file) : -1;
  if (fd < 0 || !watched(fd, &inode, path) || (syscall(SYS_fcntl, fd, F_GETFL) & O_ACCMODE) == O_RDONLY)
    return real(file);
  begin("write", path);
  if (fflush(file) == 0 && fstat(fd, &facts) == 0) note_data(fd, inode, 0, facts.st_size);
  int done = real(file);
  end();
  return done;
}

static int opened(int at, const char *path, int flags, mode_t mode) {
  uint64_t folder;
  char name[NAME_MAX + 1];
  struct stat facts;
  if ((flags & O_TMPFILE) == O_TMPFILE && place(at, path, &folder, name)) { /* no name will ever lead there */
    int fd = syscall(SYS_openat, at, path, flags, mode);
    if (fd >= 0 && fstat(fd, &facts) == 0) note('N', facts.st_ino, 0, NULL, NULL, NULL, 0);
    return fd;
  }
  if (!(flags & (O_CREAT | O_TRUNC)) || !place(at, path, &folder, name))
    return syscall(SYS_openat, at, path, flags, mode);
  int before = errno, is_new = fstatat(at, path, &facts, 0) != 0;
  errno = before;
  if (!is_new && !(flags & O_TRUNC)) return syscall(SYS_openat, at, path, flags, mode);
  begin(is_new ? "create" : "truncate", path);
  int fd = syscall(SYS_openat, at, path, flags, mode);
  if (fd >= 0 && fstat(fd, &facts) == 0) {
    if (is_new) note('C', folder, facts.st_ino, name, NULL, NULL, 0);
    else if (flags & O_TRUNC) note('T', facts.st_ino, 0, NULL, NULL, NULL, 0);
  }
  end();
  return fd;
}

static mode_t mode_of(int flags, va_list more) {
  return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(more, mode_t) : 0;
}
#define OPENS(at)                   \
  va_list more;                     \
  va_start(more, flags);            \
  mode_t mode = mode_of(flags, more); \
  va_end(more);                     \
  return opened(at, path, flags, mode);
int open(const char *path, int flags, ...) { OPENS(AT_FDCWD) }
int open64(const char *path, int flags, ...) { OPENS(AT_FDCWD) }
int openat(int at, const char *path, int flags, ...) { OPENS(at) }
int openat64(int at, const char *path, int flags, ...) { OPENS(at) }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

int ftruncate(int fd, off_t size) {
  uint64_t inode;
  char path[PATH_MAX];
  if (!watched(fd, &inode, path)) return syscall(SYS_ftruncate, fd, size);
  begin("truncate", path);
  int done = syscall(SYS_ftruncate, fd, size);
  if (done == 0) note('T', inode, (uint64_t)size, NULL, NULL, NULL, 0);
  end();
  return done;
}
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }
int truncate(const char *path, off_t size) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  int done = ftruncate(fd, size);
  syscall(SYS_close, fd);
  return done;
}
int truncate64(const char *path, off64_t size) { return truncate(path, size); }

static int synced(int fd, long call) {
  uint64_t inode;
  char path[PATH_MAX];
  if (!watched(fd, &inode, path)) return syscall(call, fd);
  begin("fsync", path);
  int done = syscall(call, fd);
  if (done == 0) note('F', inode, 0, NULL, NULL, NULL, 0);
  end();
  return done;
}
int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

int renameat2(int at, const char *old, int to, const char *new, unsigned flags) {
  uint64_t from, into;
  char first[NAME_MAX + 1], second[NAME_MAX + 1];
  int one = place(at, old, &from, first), two = place(to, new, &into, second);
  if (!one || !two) return syscall(SYS_renameat2, at, old, to, new, flags);
  begin("rename", new);
  int done = syscall(SYS_renameat2, at, old, to, new, flags);
  if (done == 0) note('R', from, into, first, second, NULL, 0);
  end();
  return done;
}
int renameat(int at, const char *old, int to, const char *new) { return renameat2(at, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int at, const char *path, int flags) {
  uint64_t folder;
  char name[NAME_MAX + 1];
  if (!place(at, path, &folder, name)) return syscall(SYS_unlinkat, at, path, flags);
  begin("delete", path);
  int done = syscall(SYS_unlinkat, at, path, flags);
  if (done == 0) note('U', folder, 0, name, NULL, NULL, 0);
  end();
  return done;
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int at, const char *path, mode_t mode) {
  uint64_t folder;
  char name[NAME_MAX + 1];
  struct stat facts;
  if (!place(at, path, &folder, name)) return syscall(SYS_mkdirat, at, path, mode);
  begin("mkdir", path);
  int done = syscall(SYS_mkdirat, at, path, mode);
  if (done == 0 && fstatat(at, path, &facts, AT_SYMLINK_NOFOLLOW) == 0)
    note('M', folder, facts.st_ino, name, NULL, NULL, 0);
  end();
  return done;
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int linkat(int at, const char *old, int to, const char *new, int flags) {
  uint64_t folder;
  char name[NAME_MAX + 1];
  struct stat facts;
  if (!place(to, new, &folder, name)) return syscall(SYS_linkat, at, old, to, new, flags);
  begin("link", new);
  int done = syscall(SYS_linkat, at, old, to, new, flags);
  if (done == 0 && fstatat(to, new, &facts, AT_SYMLINK_NOFOLLOW) == 0)
    note('L', folder, facts.st_ino, name, NULL, NULL, 0);
  end();
  return done;
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

int symlinkat(const char *target, int to, const char *new) {
  uint64_t folder;
  char name[NAME_MAX + 1];
  if (!place(to, new, &folder, name)) return syscall(SYS_symlinkat, target, to, new);
  begin("symlink", new);
  int done = syscall(SYS_symlinkat, target, to, new);
  if (done == 0) note('S', folder, 0, name, NULL, target, strlen(target));
  end();
  return done;
}
int symlink(const char *target, const char *new) { return symlinkat(target, AT_FDCWD, new); }
