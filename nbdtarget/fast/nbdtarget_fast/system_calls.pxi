# SPDX-License-Identifier: Apache-2.0
"""Functions of the kernel and of the C library.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.
"""

cdef extern from "<sys/types.h>" nogil:
    ctypedef long off_t

cdef extern from *:
    """
    #include <poll.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>

    /* In a process with threads, the functions of the C library cost two atomic operations more for each call, because a thread could be
       cancelled in them. AddressSanitizer sees what they write to memory, and nothing of what a system call does. */
    #if defined(__LP64__) && !defined(__SANITIZE_ADDRESS__)
    static inline ssize_t file_preadv2(int fd, const struct iovec *places, int count, off_t offset, int flags) {
        return syscall(SYS_preadv2, (long)fd, places, (long)count, offset, 0L, (long)flags);
    }
    static inline ssize_t file_pwrite(int fd, const void *data, size_t length, off_t offset) {
        return syscall(SYS_pwrite64, (long)fd, data, length, offset);
    }
    static inline ssize_t socket_recv(int fd, void *data, size_t length, int flags) {
        return syscall(SYS_recvfrom, (long)fd, data, length, (long)flags, NULL, NULL);
    }
    static inline ssize_t socket_send(int fd, const void *data, size_t length, int flags) {
        return syscall(SYS_sendto, (long)fd, data, length, (long)flags, NULL, 0L);
    }
    #else
    #define file_preadv2 preadv2
    #define file_pwrite pwrite
    #define socket_recv recv
    #define socket_send send
    #endif

    enum { FIRST_READY = 1, OTHER_READY = 2 };

    /* Wait until one of them is readable. Returns which are; 0: neither. */
    static inline int wait_for_either(int fd, int other_fd, int64_t wait_ns) {
        struct pollfd places[2] = {{.fd = fd, .events = POLLIN}, {.fd = other_fd, .events = POLLIN}};
        const struct timespec time = {wait_ns / 1000000000, wait_ns % 1000000000};
        if (ppoll(places, 2, &time, NULL) <= 0)
            return 0;
        return (places[0].revents ? FIRST_READY : 0) | (places[1].revents ? OTHER_READY : 0);
    }
    """
    ssize_t file_preadv2(int fd, const iovec *places, int count, off_t offset, int flags) nogil
    ssize_t file_pwrite(int fd, const void *data, size_t length, off_t offset) nogil
    ssize_t socket_recv(int fd, void *data, size_t length, int flags) nogil
    ssize_t socket_send(int fd, const void *data, size_t length, int flags) nogil
    enum:
        FIRST_READY
        OTHER_READY
    int wait_for_either(int fd, int other_fd, int64_t wait_ns) nogil

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int fd, const msghdr *message, int flags)

cdef extern from "<endian.h>" nogil:
    uint16_t be16toh(uint16_t value)
    uint32_t be32toh(uint32_t value)
    uint64_t be64toh(uint64_t value)
    uint64_t htobe64(uint64_t value)
    uint32_t htobe32(uint32_t value)

cdef extern from "<fcntl.h>" nogil:
    int sync_file_range(int fd, off_t offset, off_t length, unsigned flags)
    unsigned SYNC_FILE_RANGE_WRITE

cdef extern from "<sched.h>" nogil:
    int sched_yield()
