// An unmodified program for the notifier's tests: makes sockets and epoll instances, tells their numbers, one
// "name number" a line, and waits for the end of its standard input so that they can be looked at from outside.
//
//   helper serve     what a server does, by the calls of its libc
//   helper compat    the same by 32-bit calls, where the machine has them
//   helper signals   makes sockets for as long as it takes while a timer interrupts it
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

static struct sockaddr_in loopback;

static void tell(const char *name, int fd) {
    if (fd < 0)
        printf("%s failed: %s\n", name, strerror(errno));
    else
        printf("%s %d\n", name, fd);
}

// Gives the socket when what was done to it worked.
static int worked(int result, int fd) { return result < 0 ? -1 : fd; }

static void serve(void) {
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    tell("udp", worked(bind(fd, (void *)&loopback, sizeof loopback), fd));
    int server = socket(AF_INET, SOCK_STREAM, 0);
    tell("listening", worked(listen(server, 8), server));
    struct sockaddr_in address;
    socklen_t length = sizeof address;
    getsockname(server, (void *)&address, &length);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    fd = socket(AF_INET, SOCK_STREAM, 0);
    tell("connected", worked(connect(fd, (void *)&address, sizeof address), fd));
    struct sockaddr_un unix_address = {.sun_family = AF_UNIX};
    fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    tell("unix", worked(bind(fd, (void *)&unix_address, sizeof(sa_family_t)), fd));
    tell("epoll1", epoll_create1(EPOLL_CLOEXEC));
#ifdef SYS_epoll_create
    tell("epoll", syscall(SYS_epoll_create, 1));
#endif
}

#ifdef __x86_64__
// Not position independent, so these are below 4 GiB and 32-bit calls can name them.
static unsigned arguments[3];

static long call32(long number, long a, long b, long c) {
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory", "r8", "r9", "r10", "r11");
    if (result < 0) {
        errno = -result;
        return -1;
    }
    return result;
}

static void compat(void) {
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    tell("bind32", worked(call32(361, fd, (long)&loopback, sizeof loopback), fd));
    fd = socket(AF_INET, SOCK_DGRAM, 0);
    arguments[0] = fd;
    arguments[1] = (unsigned)(long)&loopback;
    arguments[2] = sizeof loopback;
    tell("socketcall32", worked(call32(102, 2, (long)arguments, 0), fd));
    tell("epoll32", call32(254, 1, 0, 0));
}
#else
static void compat(void) {}
#endif

static volatile sig_atomic_t interruptions;

static void on_alarm(int signal) {
    (void)signal;
    interruptions++;
}

static void signals(void) {
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    struct itimerval timer = {.it_interval = {.tv_usec = 50}, .it_value = {.tv_usec = 50}};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &timer, NULL);
    int made = 0;
    for (; made < 2000 || (interruptions < 500 && made < 200000); made++) {
        int fd = socket(AF_INET, SOCK_DGRAM, 0);
        int epoll = epoll_create1(0);
        int window = 0;
        socklen_t length = sizeof window;
        int bound = bind(fd, (void *)&loopback, sizeof loopback);
        getsockopt(fd, SOL_SOCKET, SO_BUSY_POLL, &window, &length);
        if (bound < 0 || epoll < 0 || window == 0) {
            tell("interrupted", -1);
            break;
        }
        close(fd);
        close(epoll);
    }
    memset(&timer, 0, sizeof timer);
    setitimer(ITIMER_REAL, &timer, NULL);
    tell("made", made);
    tell("interruptions", interruptions);
    // What a race gave twice would still be open.
    tell("next", dup(0));
}

int main(int count, char **words) {
    loopback.sin_family = AF_INET;
    loopback.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const char *mode = count > 1 ? words[1] : "";
    if (strcmp(mode, "serve") == 0)
        serve();
    else if (strcmp(mode, "compat") == 0)
        compat();
    else if (strcmp(mode, "signals") == 0)
        signals();
    else
        return 2;
    puts("ready");
    fflush(stdout);
    char byte;
    while (read(0, &byte, 1) > 0) {
    }
    return 0;
}
