/* Counts and breaks a process's changes to files under one folder; preloaded, see faultfs.py.
 *
 * What `strace -f -e trace=file,desc,write` shows (safetensors 0.8.0, CPython 3.11, x86-64 Linux):
 *   save_file        openat(.tmpXXXXXX, O_CREAT|O_EXCL, 0600), ftruncate to the full size, write of the header, write of the
 *                    tensors (those below 1 MiB gathered in a buffer), renameat to the name asked for; no fsync, no mmap, and
 *                    the file keeps mode 0600
 *   Python           openat, write, fsync, ftruncate, rename (also for os.replace), mkdir, link, symlink, unlink;
 *                    unlinkat and rmdir from shutil.rmtree, sendfile and no write from shutil.copyfile
 * The renameat of save_file is a `syscall` instruction inside safetensors' own library (Rust's rustix), and fwrite, mkstemp
 * and the like call write and open inside libc. None of these goes through a symbol that a preloaded library could replace.
 * So calls are caught below libc: a seccomp filter turns the system calls of the table into SIGSYS, whose handler does what
 * the call asked for, or the fault. Calls from the one page that the handler itself uses pass. That page lies at the same
 * address in every process, because a filter outlives exec.
 *
 * Not caught: writes into a shared mapping (mmap itself counts as one write of its length), msync, openat2, io_uring, times
 * and extended attributes. A child process must keep LD_PRELOAD: without the handler its first caught call kills it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef SYS_SECCOMP
#define SYS_SECCOMP 1 /* si_code of a trap; glibc leaves it out */
#endif

#if !defined(__linux__) || !defined(__x86_64__) || defined(__ILP32__)
#error "faultfs knows the registers and system calls of x86-64 Linux alone"
#endif

/* A system call that changes files: which of its arguments say what. NONE: it has no such argument. */
#define NONE (-1)
enum data { PLAIN, BUFFER, VECTOR, COPY };
struct call {
    long number;
    const char *kind;
    int fd;             /* the file, when it is open */
    int dir, path;      /* else the place that the call makes or takes away */
    int dir2, path2;    /* and the place it comes from */
    int bytes;
    enum data data;     /* how a write gives its data; PLAIN: it writes none */
};
static const struct call CALLS[] = {
    {SYS_open, "open", NONE, NONE, 0, NONE, NONE, NONE, PLAIN},
    {SYS_openat, "open", NONE, 0, 1, NONE, NONE, NONE, PLAIN},
    {SYS_creat, "open", NONE, NONE, 0, NONE, NONE, NONE, PLAIN},
    {SYS_write, "write", 0, NONE, NONE, NONE, NONE, 2, BUFFER},
    {SYS_pwrite64, "write", 0, NONE, NONE, NONE, NONE, 2, BUFFER},
    {SYS_writev, "write", 0, NONE, NONE, NONE, NONE, NONE, VECTOR},
    {SYS_pwritev, "write", 0, NONE, NONE, NONE, NONE, NONE, VECTOR},
    {SYS_pwritev2, "write", 0, NONE, NONE, NONE, NONE, NONE, VECTOR},
    {SYS_sendfile, "write", 0, NONE, NONE, NONE, NONE, 3, COPY},
    {SYS_copy_file_range, "write", 2, NONE, NONE, NONE, NONE, 4, COPY},
    {SYS_mmap, "mmap", 4, NONE, NONE, NONE, NONE, 1, PLAIN},
    {SYS_ftruncate, "truncate", 0, NONE, NONE, NONE, NONE, 1, PLAIN},
    {SYS_truncate, "truncate", NONE, NONE, 0, NONE, NONE, 1, PLAIN},
    {SYS_fallocate, "allocate", 0, NONE, NONE, NONE, NONE, 3, PLAIN},
    {SYS_fsync, "fsync", 0, NONE, NONE, NONE, NONE, NONE, PLAIN},
    {SYS_fdatasync, "fsync", 0, NONE, NONE, NONE, NONE, NONE, PLAIN},
    {SYS_rename, "rename", NONE, NONE, 1, NONE, 0, NONE, PLAIN},
    {SYS_renameat, "rename", NONE, 2, 3, 0, 1, NONE, PLAIN},
    {SYS_renameat2, "rename", NONE, 2, 3, 0, 1, NONE, PLAIN},
    {SYS_link, "link", NONE, NONE, 1, NONE, NONE, NONE, PLAIN},
    {SYS_linkat, "link", NONE, 2, 3, NONE, NONE, NONE, PLAIN},
    {SYS_symlink, "symlink", NONE, NONE, 1, NONE, NONE, NONE, PLAIN},
    {SYS_symlinkat, "symlink", NONE, 1, 2, NONE, NONE, NONE, PLAIN},
    {SYS_unlink, "unlink", NONE, NONE, 0, NONE, NONE, NONE, PLAIN},
    {SYS_unlinkat, "unlink", NONE, 0, 1, NONE, NONE, NONE, PLAIN},
    {SYS_mkdir, "mkdir", NONE, NONE, 0, NONE, NONE, NONE, PLAIN},
    {SYS_mkdirat, "mkdir", NONE, 0, 1, NONE, NONE, NONE, PLAIN},
    {SYS_rmdir, "rmdir", NONE, NONE, 0, NONE, NONE, NONE, PLAIN},
    {SYS_chmod, "chmod", NONE, NONE, 0, NONE, NONE, NONE, PLAIN},
    {SYS_fchmod, "chmod", 0, NONE, NONE, NONE, NONE, NONE, PLAIN},
    {SYS_fchmodat, "chmod", NONE, 0, 1, NONE, NONE, NONE, PLAIN},
};
#define CALL_COUNT (sizeof CALLS / sizeof *CALLS)

static char root[PATH_MAX];
static char log_path[PATH_MAX];
static atomic_long operations;

enum action { NOTHING, KILL, KILL_AFTER, TEAR, FAIL, SLEEP };
static struct {
    enum action action;
    long at;
    int onwards;
    int error;
    struct timespec pause;
} fault;

/* -- the gate: system calls that the filter lets through ------------------------------------------------------------- */

#define GATE 0x200000000000ul
__asm__(".text\n"
        "faultfs_gate:\n"
        "mov %rdi, %rax\n mov %rsi, %rdi\n mov %rdx, %rsi\n mov %rcx, %rdx\n mov %r8, %r10\n mov %r9, %r8\n mov 8(%rsp), %r9\n"
        "syscall\n ret\n"
        "faultfs_gate_end:\n");
extern const char faultfs_gate[] __attribute__((visibility("hidden")));
extern const char faultfs_gate_end[] __attribute__((visibility("hidden")));

typedef long (*gate_function)(long number, long a, long b, long c, long d, long e, long f);
static long gate(long number, long a, long b, long c, long d, long e, long f) {
    return ((gate_function)GATE)(number, a, b, c, d, e, f);
}

/* -- which file it is ------------------------------------------------------------------------------------------------- */

/* Appends a number in decimal: printf is not safe in a signal handler. */
static char *put_number(char *end, long number) {
    char digits[24];
    int count = 0;
    unsigned long rest = number < 0 ? -(unsigned long)number : (unsigned long)number;
    do digits[count++] = (char)('0' + rest % 10); while (rest /= 10);
    if (number < 0) *end++ = '-';
    while (count) *end++ = digits[--count];
    return end;
}

/* The path behind an open descriptor (a pipe or a socket has one that is under no folder); returns its length. */
static long path_of_fd(int fd, char *path) {
    char link[48] = "/proc/self/fd/";
    *put_number(link + strlen(link), fd) = 0;
    long length = gate(SYS_readlink, (long)link, (long)path, PATH_MAX - 1, 0, 0, 0);
    if (length < 0) length = 0;
    path[length] = 0;
    return length;
}

/* The path of a name that need not exist: its folder, resolved by the kernel, and the last part. "" if there is no folder. */
static void path_of_name(int dir, const char *name, char *path) {
    char folder[PATH_MAX];
    path[0] = 0;
    size_t end = name ? strnlen(name, PATH_MAX) : 0;
    if (end == 0 || end == PATH_MAX) return;
    while (end > 1 && name[end - 1] == '/') end--;
    size_t base = end;
    while (base > 0 && name[base - 1] != '/') base--;
    memcpy(folder, base ? name : ".", base ? base : 1);
    folder[base ? base : 1] = 0;
    long fd = gate(SYS_openat, dir, (long)folder, O_PATH | O_DIRECTORY | O_CLOEXEC, 0, 0, 0);
    if (fd < 0) return;
    size_t length = (size_t)path_of_fd((int)fd, path);
    gate(SYS_close, fd, 0, 0, 0, 0, 0);
    if (length + 1 + end - base >= PATH_MAX) return;
    path[length] = '/';
    memcpy(path + length + 1, name + base, end - base);
    path[length + 1 + end - base] = 0;
}

static int under_root(const char *path) {
    size_t length = strlen(root);
    return strncmp(path, root, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* Whether the call is about a file in scope; `path` is then the file's, for a rename or link the new name. */
static int in_scope(const struct call *call, const long *a, char *path) {
    if (call->fd != NONE) {
        path_of_fd((int)a[call->fd], path);
        return under_root(path);
    }
    path_of_name(call->dir == NONE ? AT_FDCWD : (int)a[call->dir], (const char *)a[call->path], path);
    if (under_root(path)) return 1;
    if (call->path2 == NONE) return 0;
    char source[PATH_MAX];
    path_of_name(call->dir2 == NONE ? AT_FDCWD : (int)a[call->dir2], (const char *)a[call->path2], source);
    return under_root(source);
}

/* -- how much it writes ----------------------------------------------------------------------------------------------- */

/* What is left in the source of a copy: callers ask for far more than there is. */
static long bytes_left(int fd, const long *offset, long asked) {
    struct stat status;
    long position = offset ? *offset : gate(SYS_lseek, fd, 0, SEEK_CUR, 0, 0, 0);
    if (position < 0 || gate(SYS_fstat, fd, (long)&status, 0, 0, 0, 0) < 0 || !S_ISREG(status.st_mode)) return asked;
    long left = status.st_size > position ? status.st_size - position : 0;
    return left < asked ? left : asked;
}

static long bytes_of(const struct call *call, const long *a) {
    long bytes = call->bytes == NONE ? 0 : a[call->bytes];
    if (call->data == VECTOR)
        for (long i = 0; i < a[2]; i++) bytes += (long)((const struct iovec *)a[1])[i].iov_len;
    if (call->number == SYS_sendfile) bytes = bytes_left((int)a[1], (const long *)a[2], bytes);
    if (call->number == SYS_copy_file_range) bytes = bytes_left((int)a[0], (const long *)a[1], bytes);
    return bytes;
}

/* Does the first `bytes` of a write. */
static void write_part(const struct call *call, const long *a, long bytes) {
    if (call->data != VECTOR) {
        long b[6];
        memcpy(b, a, sizeof b);
        b[call->bytes] = bytes;
        gate(call->number, b[0], b[1], b[2], b[3], b[4], b[5]);
        return;
    }
    const struct iovec *parts = (const struct iovec *)a[1];
    /* pwritev2 takes -1 for the file's own position. */
    int positioned = call->number != SYS_writev && a[3] != -1;
    long position = a[3];
    for (long i = 0; i < a[2] && bytes > 0; i++) {
        long size = (long)parts[i].iov_len < bytes ? (long)parts[i].iov_len : bytes;
        gate(positioned ? SYS_pwrite64 : SYS_write, a[0], (long)parts[i].iov_base, size, position, 0, 0);
        position += size;
        bytes -= size;
    }
}

/* -- what happens ----------------------------------------------------------------------------------------------------- */

/* One line, "k kind path bytes". The file is opened each time: a descriptor kept open could be closed by the program. */
static void append_to_log(long k, const char *kind, const char *path, long bytes) {
    char line[PATH_MAX + 96];
    char *end = put_number(line, k);
    *end++ = ' ';
    end = stpcpy(end, kind);
    *end++ = ' ';
    end = stpcpy(end, path);
    *end++ = ' ';
    end = put_number(end, bytes);
    *end++ = '\n';
    long fd = gate(SYS_openat, AT_FDCWD, (long)log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644, 0, 0);
    if (fd < 0) return;
    gate(SYS_write, fd, (long)line, end - line, 0, 0, 0);
    gate(SYS_close, fd, 0, 0, 0, 0, 0);
}

static void die(void) {
    for (;;) gate(SYS_kill, gate(SYS_getpid, 0, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0, 0);
}

static long perform(const struct call *call, const long *a) {
    char path[PATH_MAX];
    if (!in_scope(call, a, path)) return gate(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
    const char *kind = call->number == SYS_unlinkat && (a[2] & AT_REMOVEDIR) ? "rmdir" : call->kind;
    long bytes = bytes_of(call, a);
    long k = atomic_fetch_add(&operations, 1) + 1;
    if (log_path[0]) append_to_log(k, kind, path, bytes);
    /* A full disk lets files be deleted. */
    int full = fault.error == ENOSPC || fault.error == EDQUOT;
    int spared = full && (!strcmp(kind, "unlink") || !strcmp(kind, "rmdir"));
    enum action action = k == fault.at || (fault.onwards && k > fault.at && !spared) ? fault.action : NOTHING;
    if (action == FAIL) return -fault.error;
    if (action == TEAR && call->data != PLAIN) write_part(call, a, bytes / 2);
    if (action == KILL || action == TEAR) die();
    if (action == SLEEP) {
        struct timespec left = fault.pause;
        while (gate(SYS_nanosleep, (long)&left, (long)&left, 0, 0, 0, 0) == -EINTR) {}
    }
    long result = gate(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (action == KILL_AFTER) die();
    return result;
}

static void on_trap(int signal, siginfo_t *info, void *context) {
    (void)signal;
    if (info->si_code != SYS_SECCOMP) return;
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    long a[6] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
    for (size_t i = 0; i < CALL_COUNT; i++)
        if (CALLS[i].number == info->si_syscall) {
            r[REG_RAX] = perform(&CALLS[i], a);
            return;
        }
}

/* -- SIGSYS stays ours ------------------------------------------------------------------------------------------------ */

/* A caught call kills a thread that blocks SIGSYS, and faulthandler's watchdog blocks all signals that it can. */
static int change_mask(const char *name, int how, const sigset_t *set, sigset_t *old) {
    int (*real)(int, const sigset_t *, sigset_t *) = (int (*)(int, const sigset_t *, sigset_t *))dlsym(RTLD_NEXT, name);
    sigset_t without;
    if (set && how != SIG_UNBLOCK) {
        without = *set;
        sigdelset(&without, SIGSYS);
        set = &without;
    }
    return real(how, set, old);
}
int pthread_sigmask(int how, const sigset_t *set, sigset_t *old) { return change_mask("pthread_sigmask", how, set, old); }
int sigprocmask(int how, const sigset_t *set, sigset_t *old) { return change_mask("sigprocmask", how, set, old); }

/* subprocess takes every handler back in the child, which has yet to report an exec that failed. */
static int real_sigaction(int signal, const struct sigaction *action, struct sigaction *old) {
    int (*real)(int, const struct sigaction *, struct sigaction *) =
        (int (*)(int, const struct sigaction *, struct sigaction *))dlsym(RTLD_NEXT, "sigaction");
    return real(signal, action, old);
}
int sigaction(int signal, const struct sigaction *action, struct sigaction *old) {
    return real_sigaction(signal, signal == SIGSYS ? NULL : action, old);
}

/* -- the start -------------------------------------------------------------------------------------------------------- */

static void give_up(const char *what) {
    dprintf(2, "faultfs: %s: %s\n", what, strerror(errno));
    _exit(127);
}

static void install_filter(void) {
    struct sock_filter code[3 * CALL_COUNT + 32];
    unsigned short n = 0;
#define EMIT(...) (code[n++] = (struct sock_filter)__VA_ARGS__)
#define LOAD(field) EMIT(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (unsigned)(field)))
#define UNLESS_EQUAL(value, skip) EMIT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)(value), 0, skip))
#define RETURN(what) EMIT(BPF_STMT(BPF_RET | BPF_K, what))
#define LOW(index) (offsetof(struct seccomp_data, args) + 8 * (index))
    LOAD(offsetof(struct seccomp_data, arch));
    UNLESS_EQUAL(AUDIT_ARCH_X86_64, 2);
    LOAD(offsetof(struct seccomp_data, instruction_pointer) + 4);
    EMIT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, GATE >> 32, 0, 1));
    RETURN(SECCOMP_RET_ALLOW);
    LOAD(offsetof(struct seccomp_data, nr));
    for (size_t i = 0; i < CALL_COUNT; i++) {
        long number = CALLS[i].number;
        if (number == SYS_open || number == SYS_openat) { /* reading is none of our business */
            UNLESS_EQUAL(number, 4);
            LOAD(LOW(number == SYS_open ? 1 : 2));
            EMIT(BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, O_CREAT | O_TRUNC | (O_TMPFILE & ~O_DIRECTORY), 0, 1));
            RETURN(SECCOMP_RET_TRAP);
            RETURN(SECCOMP_RET_ALLOW);
        } else if (number == SYS_mmap) { /* shared, of a file, to be written */
            UNLESS_EQUAL(number, 8);
            LOAD(LOW(3));
            EMIT(BPF_STMT(BPF_ALU | BPF_AND | BPF_K, MAP_SHARED | MAP_PRIVATE | MAP_ANONYMOUS));
            EMIT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MAP_PRIVATE, 3, 0));
            EMIT(BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, MAP_ANONYMOUS, 2, 0));
            LOAD(LOW(2));
            EMIT(BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, PROT_WRITE, 1, 0));
            RETURN(SECCOMP_RET_ALLOW);
            RETURN(SECCOMP_RET_TRAP);
        } else {
            UNLESS_EQUAL(number, 1);
            RETURN(SECCOMP_RET_TRAP);
        }
    }
    RETURN(SECCOMP_RET_ALLOW);
    struct sock_fprog program = {n, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) give_up("no_new_privs");
    /* SPEC_ALLOW: without it the kernel slows the whole process down, as for one that it must not trust. */
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program)) give_up("seccomp");
}

static void read_fault(const char *text) {
    static const struct { const char *name; int value; } ERRORS[] = {
        {"ENOSPC", ENOSPC}, {"EROFS", EROFS}, {"EACCES", EACCES}, {"EDQUOT", EDQUOT}, {"EIO", EIO}};
    char action[16] = "", extra[32] = "";
    int end = 0;
    errno = EINVAL;
    if (sscanf(text, "%15[a-z]:%31[A-Z0-9.]@%ld%n", action, extra, &fault.at, &end) != 3 &&
        sscanf(text, "%15[a-z]@%ld%n", action, &fault.at, &end) != 2)
        give_up(text);
    fault.onwards = text[end] == '+';
    if (text[end + fault.onwards]) give_up(text);
    if (!strcmp(action, "kill")) fault.action = KILL;
    if (!strcmp(action, "killafter")) fault.action = KILL_AFTER;
    if (!strcmp(action, "tear")) fault.action = TEAR;
    if (!strcmp(action, "sleep") && extra[0]) {
        double seconds = atof(extra);
        fault.action = SLEEP;
        fault.pause.tv_sec = (time_t)seconds;
        fault.pause.tv_nsec = (long)((seconds - (double)fault.pause.tv_sec) * 1e9);
    }
    if (!strcmp(action, "errno"))
        for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
            if (!strcmp(extra, ERRORS[i].name)) {
                fault.action = FAIL;
                fault.error = ERRORS[i].value;
            }
    if (fault.action == NOTHING || fault.at < 1) give_up(text);
}

/* FAULTFS_LOG with {rank} replaced. */
static void set_log_path(const char *template, const char *rank) {
    const char *mark = strstr(template, "{rank}");
    int before = mark ? (int)(mark - template) : (int)strlen(template);
    snprintf(log_path, sizeof log_path, "%.*s%s%s", before, template, mark ? rank : "", mark ? mark + 6 : "");
}

__attribute__((constructor)) static void start(void) {
    const char *folder = getenv("FAULTFS_ROOT"), *log = getenv("FAULTFS_LOG"), *text = getenv("FAULTFS_FAULT");
    const char *rank = getenv("RANK"), *only = getenv("FAULTFS_RANK");
    if (!folder) {
        /* A process that inherited the filter needs the handler all the same. */
        root[0] = '\n';
    } else if (!realpath(folder, root)) {
        give_up(folder);
    }
    if (!rank) rank = "0";
    if (log) set_log_path(log, rank);
    if (text && (!only || !strcmp(only, rank))) read_fault(text);
    void *page = mmap((void *)GATE, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (page != (void *)GATE) give_up("the gate's page");
    memcpy(page, faultfs_gate, (size_t)(faultfs_gate_end - faultfs_gate));
    if (mprotect(page, 4096, PROT_READ | PROT_EXEC)) give_up("the gate's page");
    /* NODEFER: a signal handler that runs while a caught call waits may write too. */
    struct sigaction handler = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
    sigset_t mine;
    sigemptyset(&mine);
    sigaddset(&mine, SIGSYS);
    if (real_sigaction(SIGSYS, &handler, NULL) || sigprocmask(SIG_UNBLOCK, &mine, NULL)) give_up("SIGSYS");
    if (folder) install_filter();
}
