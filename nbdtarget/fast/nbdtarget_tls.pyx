# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""The records of TLS, from the socket to plaintext and back, without the interpreter.

Theory of operation. Python's `ssl` makes the context and carries out the handshake. After that a `TlsRecords` uses the same
`SSL` object, by the functions of the library that Python's own module `_ssl` has loaded. Nothing is linked, and no header of OpenSSL is needed:

    dlopen(_ssl, RTLD_NOLOAD)      the module is loaded already
    dlsym(SSL_read, ...)           in it, or in what it was linked to; hidden names: this module is not used

The `SSL` is found in the object of `_ssl`, in front of which CPython stores no more than the head of an object and one reference. That is
verified by what is known otherwise, before it is used: behind the `SSL` must stand the context, and the `SSL` must know
the same `SSL_CTX` as the context does. Every byte that is read for this lies in an object, by the size of its type. `why_not` verifies it once with an object that is thrown away.

Between the library and the socket stands a BIO of our own, which is the two buffers of `Records`:

    recv -> incoming -> SSL_read -> the caller's buffer
    the caller's buffer -> SSL_write -> outgoing -> send

What each call promises stands in `nbdtarget.common.tls_socket`, whose compiled twin this is: the same bounds, the same ends,
the same rule for what is sealed. Python's object lives on. `unwrap` writes into the same BIO, and `drain` sends that.

Threads. A `TlsRecords` is used by one thread at a time. OpenSSL keeps its errors by thread; they are cleared before each call.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.ref cimport PyObject
from libc.errno cimport (
    EAGAIN,
    EBADF,
    ECONNABORTED,
    ECONNREFUSED,
    ECONNRESET,
    EINTR,
    ENOMEM,
    EPIPE,
    EPROTO,
    ESHUTDOWN,
    errno,
)
from libc.stdint cimport uint8_t, uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove, memset

import os

cdef extern from "<dlfcn.h>" nogil:
    int RTLD_LAZY
    int RTLD_NOLOAD
    void *dlopen(const char *path, int flags)
    void *dlsym(void *library, const char *name)

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    ssize_t recv(int fd, void *data, size_t length, int flags)
    ssize_t send(int fd, const void *data, size_t length, int flags)

cdef extern from *:
    """
    #include <errno.h>

    static inline void set_errno(int error) { errno = error; }

    typedef int (*tls_bio_read)(void *, char *, int);
    typedef int (*tls_bio_write)(void *, const char *, int);
    typedef long (*tls_bio_ctrl)(void *, int, long, void *);
    typedef int (*tls_bio_create)(void *);

    /* Functions of OpenSSL 1.1.1 and later. */
    static struct {
        int (*SSL_read)(void *, void *, int);
        int (*SSL_write)(void *, const void *, int);
        int (*SSL_get_error)(const void *, int);
        void *(*SSL_get_SSL_CTX)(const void *);
        void *(*SSL_get_rbio)(const void *);
        void *(*SSL_get_wbio)(const void *);
        void (*SSL_set_bio)(void *, void *, void *);
        int (*BIO_get_new_index)(void);
        void *(*BIO_meth_new)(int, const char *);
        int (*BIO_meth_set_read)(void *, tls_bio_read);
        int (*BIO_meth_set_write)(void *, tls_bio_write);
        int (*BIO_meth_set_ctrl)(void *, tls_bio_ctrl);
        int (*BIO_meth_set_create)(void *, tls_bio_create);
        void *(*BIO_new)(const void *);
        int (*BIO_free)(void *);
        int (*BIO_up_ref)(void *);
        int (*BIO_read)(void *, void *, int);
        long (*BIO_ctrl)(void *, int, long, void *);
        void (*BIO_set_data)(void *, void *);
        void *(*BIO_get_data)(void *);
        void (*BIO_set_init)(void *, int);
        void (*BIO_set_flags)(void *, int);
        void (*BIO_clear_flags)(void *, int);
        void (*ERR_clear_error)(void);
        unsigned long (*ERR_peek_last_error)(void);
        const char *(*ERR_reason_error_string)(unsigned long);
    } tls;
    """
    void set_errno(int error) nogil
    ctypedef int (*tls_bio_read)(void *, char *, int) noexcept nogil
    ctypedef int (*tls_bio_write)(void *, const char *, int) noexcept nogil
    ctypedef long (*tls_bio_ctrl)(void *, int, long, void *) noexcept nogil
    ctypedef int (*tls_bio_create)(void *) noexcept nogil
    struct Functions:
        int (*SSL_read)(void *, void *, int) noexcept nogil
        int (*SSL_write)(void *, const void *, int) noexcept nogil
        int (*SSL_get_error)(const void *, int) noexcept nogil
        void *(*SSL_get_SSL_CTX)(const void *) noexcept nogil
        void *(*SSL_get_rbio)(const void *) noexcept nogil
        void *(*SSL_get_wbio)(const void *) noexcept nogil
        void (*SSL_set_bio)(void *, void *, void *) noexcept nogil
        int (*BIO_get_new_index)() noexcept nogil
        void *(*BIO_meth_new)(int, const char *) noexcept nogil
        int (*BIO_meth_set_read)(void *, tls_bio_read) noexcept nogil
        int (*BIO_meth_set_write)(void *, tls_bio_write) noexcept nogil
        int (*BIO_meth_set_ctrl)(void *, tls_bio_ctrl) noexcept nogil
        int (*BIO_meth_set_create)(void *, tls_bio_create) noexcept nogil
        void *(*BIO_new)(const void *) noexcept nogil
        int (*BIO_free)(void *) noexcept nogil
        int (*BIO_up_ref)(void *) noexcept nogil
        int (*BIO_read)(void *, void *, int) noexcept nogil
        long (*BIO_ctrl)(void *, int, long, void *) noexcept nogil
        void (*BIO_set_data)(void *, void *) noexcept nogil
        void *(*BIO_get_data)(void *) noexcept nogil
        void (*BIO_set_init)(void *, int) noexcept nogil
        void (*BIO_set_flags)(void *, int) noexcept nogil
        void (*BIO_clear_flags)(void *, int) noexcept nogil
        void (*ERR_clear_error)() noexcept nogil
        unsigned long (*ERR_peek_last_error)() noexcept nogil
        const char *(*ERR_reason_error_string)(unsigned long) noexcept nogil
    Functions tls

__all__ = ["ABI", "SEAL_MAX", "TlsRecords", "take_over", "why_not"]

ABI = 14  # of `nbdtarget.fast.compiled`

cdef enum:
    # Encrypted bytes, received with one system call. A peer may fill it with new keys, each of which takes 10 us.
    IN_BYTES = 65536
    # Bytes that are encrypted before they are sent: the peer decrypts them while the next ones are encrypted. With what encryption adds they fit into one
    # packet of the loopback device (65464 bytes over IPv6). At 65536 each piece had a second packet of 150 bytes, which costs both sides 3 % of a READ.
    SEAL_BYTES = 65024
    SEND_BYTES = 1048576  # in one call of `tls_send`
    RECORD_BYTES = 16384  # of plaintext in a record; shorter pieces share one
    REST_BYTES = RECORD_BYTES  # what is left behind SEAL_BYTES leaves with them if it is no more than that
    OUT_STEP = 65536  # by which the buffer of outgoing bytes grows, at least
    OUT_KEPT = 196608  # of that buffer when all has left: what one piece of a long reply needs
    OUT_MAX = 4194304  # more than what is sealed at once, and all answers to what is received at once
    AHEAD_BYTES = 1048576  # that a peek decrypts
    PIECES_MAX = 64  # of one call from Python

    # OpenSSL's numbers, which are a part of its interface.
    SSL_ERROR_SSL = 1
    SSL_ERROR_WANT_READ = 2
    SSL_ERROR_SYSCALL = 5
    SSL_ERROR_ZERO_RETURN = 6
    SSL_R_UNEXPECTED_EOF = 294
    BIO_TYPE_SOURCE_SINK = 0x0400
    BIO_CTRL_EOF = 2
    BIO_CTRL_PENDING = 10
    BIO_CTRL_FLUSH = 11
    BIO_CTRL_DUP = 12
    BIO_CTRL_WPENDING = 13
    BIO_FLAGS_RETRIES = 15
    BIO_FLAGS_READ_AGAIN = 9

cdef enum Why:
    WHY_OPENSSL  # see `reason`
    WHY_SILENT
    WHY_ANSWERS
    WHY_OTHERS  # what is to be sent does not begin with what is sealed

SEAL_MAX = SEAL_BYTES  # for tests


# ---- the BIO ----

cdef void *method = NULL


cdef int bio_create(void *bio) noexcept nogil:
    tls.BIO_set_init(bio, 1)
    return 1


cdef int bio_read(void *bio, char *into, int size) noexcept nogil:
    cdef Records *records = <Records *>tls.BIO_get_data(bio)
    cdef size_t nr
    tls.BIO_clear_flags(bio, BIO_FLAGS_RETRIES)
    if records == NULL or size <= 0:
        return -1
    nr = records.in_end - records.in_begin
    if not nr:
        if records.is_end:
            return 0
        tls.BIO_set_flags(bio, BIO_FLAGS_READ_AGAIN)
        return -1
    if nr > <size_t>size:
        nr = <size_t>size
    memcpy(into, records.incoming + records.in_begin, nr)
    records.in_begin += nr
    return <int>nr


cdef int bio_write(void *bio, const char *data, int size) noexcept nogil:
    cdef Records *records = <Records *>tls.BIO_get_data(bio)
    tls.BIO_clear_flags(bio, BIO_FLAGS_RETRIES)
    if records == NULL or size <= 0 or not has_room(records, <size_t>size):
        return -1
    memcpy(records.outgoing + records.out_end, data, <size_t>size)
    records.out_end += <size_t>size
    return size


cdef bint has_room(Records *records, size_t size) noexcept nogil:
    """Make room for so many encrypted bytes more; whether that was possible."""
    cdef size_t room
    cdef void *larger
    if records.out_end + size <= records.out_room:
        return True
    if records.out_begin:
        memmove(records.outgoing, records.outgoing + records.out_begin, records.out_end - records.out_begin)
        records.out_end -= records.out_begin
        records.out_begin = 0
        if records.out_end + size <= records.out_room:
            return True
    room = max(records.out_end + size, records.out_room + max(<size_t>OUT_STEP, records.out_room // 2))
    if records.out_end + size > OUT_MAX:
        return False
    larger = realloc(records.outgoing, room)
    if larger == NULL:
        return False
    records.outgoing = <uint8_t *>larger
    records.out_room = room
    return True


cdef long bio_ctrl(void *bio, int command, long number, void *pointer) noexcept nogil:
    cdef Records *records = <Records *>tls.BIO_get_data(bio)
    if command == BIO_CTRL_FLUSH or command == BIO_CTRL_DUP:
        return 1
    if records == NULL:
        return 0
    if command == BIO_CTRL_EOF:
        return records.is_end and records.in_begin == records.in_end
    if command == BIO_CTRL_PENDING:
        return <long>(records.in_end - records.in_begin)
    if command == BIO_CTRL_WPENDING:
        return <long>(records.out_end - records.out_begin)
    return 0  # what we do not know, we do not do: kernel TLS, for example


# ---- receiving ----

cdef int fill(Records *records) noexcept nogil:
    """Receive once; `incoming` is empty. Return 0, or -1: see errno."""
    cdef ssize_t got = recv(records.fd, records.incoming, IN_BYTES, MSG_DONTWAIT)
    while got < 0 and errno == EINTR:
        got = recv(records.fd, records.incoming, IN_BYTES, MSG_DONTWAIT)
    if got < 0:
        records.is_more_likely = False
        return -1
    records.in_begin = 0
    records.in_end = <size_t>got
    records.is_more_likely = got == IN_BYTES
    records.nr_silent += <size_t>got
    if not got:
        records.is_end = True
    return 0


cdef int drain(Records *records) noexcept nogil:
    """Send what is encrypted. Return 1: all of it has left, 0: not all, -1: see errno."""
    cdef ssize_t sent
    while records.out_begin < records.out_end:
        sent = send(
            records.fd, records.outgoing + records.out_begin, records.out_end - records.out_begin,
            MSG_DONTWAIT | MSG_NOSIGNAL,
        )
        if sent < 0:
            if errno == EINTR:
                continue
            return 0 if errno == EAGAIN else -1
        records.out_begin += <size_t>sent
    records.out_begin = records.out_end = 0
    if records.out_room > OUT_KEPT:
        # Many answers have waited once: a connection keeps no memory for that.
        free(records.outgoing)
        records.outgoing = NULL
        records.out_room = 0
    return 1


cdef int answer(Records *records) noexcept nogil:
    """Send what OpenSSL has to say to the peer. Return 0, or -1: see errno."""
    # A peer that has gone takes no answer. What it sent before is received all the same.
    if drain(records) < 0 and not (
        errno == EPIPE or errno == ECONNRESET or errno == ECONNABORTED or errno == ESHUTDOWN or errno == ECONNREFUSED
    ):
        return -1
    if records.out_end - records.out_begin > records.answers_max + 2 * records.sealed:
        return fail(records, WHY_ANSWERS)
    return 0


cdef int fail(Records *records, int why) noexcept nogil:
    records.why = why
    records.reason = tls.ERR_peek_last_error() if why == WHY_OPENSSL else 0
    tls.ERR_clear_error()
    set_errno(EPROTO)
    return -1


cdef bint has_ended(Records *records, int error) noexcept nogil:
    """Whether it is an end: of the peer's words, or of its stream."""
    if error == SSL_ERROR_ZERO_RETURN:
        return True
    if not records.is_end or records.in_begin < records.in_end:
        return False
    return error == SSL_ERROR_SYSCALL or (
        error == SSL_ERROR_SSL and (tls.ERR_peek_last_error() & 0x7FFFFF) == SSL_R_UNEXPECTED_EOF
    )


cdef ssize_t tls_receive(Records *records, void *into, size_t length) noexcept nogil:
    cdef size_t nr
    if records.ahead_begin < records.ahead_end:
        nr = min(length, records.ahead_end - records.ahead_begin)
        memcpy(into, records.ahead + records.ahead_begin, nr)
        records.ahead_begin += nr
        if records.ahead_begin == records.ahead_end:
            free(records.ahead)
            records.ahead = NULL
            records.ahead_begin = records.ahead_end = records.ahead_room = 0
        return <ssize_t>nr
    return decrypt(records, <uint8_t *>into, length)


cdef ssize_t decrypt(Records *records, uint8_t *into, size_t length) noexcept nogil:
    cdef size_t got = 0
    cdef int nr = 0, error
    cdef bint is_over = False
    if records.fd < 0:
        set_errno(EBADF)
        return -1
    if not length:
        return 0
    if not records.is_full and records.in_begin == records.in_end and fill(records) < 0:
        return -1
    tls.ERR_clear_error()
    while got < length:
        nr = tls.SSL_read(records.ssl, into + got, <int>min(length - got, <size_t>0x40000000))
        if nr > 0:
            got += <size_t>nr
            records.nr_silent = 0
            if records.in_begin == records.in_end and not records.is_more_likely:
                break
            continue
        error = tls.SSL_get_error(records.ssl, nr)
        if error != SSL_ERROR_WANT_READ:
            if not has_ended(records, error):
                return fail(records, WHY_OPENSSL)
            tls.ERR_clear_error()
            is_over = True
            break
        # What was received is decrypted.
        if records.out_begin < records.out_end and answer(records) < 0:
            return -1
        if got and not records.is_more_likely:
            break
        if records.nr_silent > records.silent_max:
            return fail(records, WHY_SILENT)
        if fill(records) < 0:
            if got and errno == EAGAIN:
                break
            records.is_full = False
            return -1
    # An end that came behind data is told by the next call.
    records.is_full = got == length or (got and is_over)
    if records.out_begin < records.out_end and answer(records) < 0:
        return -1
    return <ssize_t>got


# ---- sending ----

cdef int seal(Records *records, const void *data, size_t length) noexcept nogil:
    """Encrypt. Return 0, or -1: see errno."""
    if tls.SSL_write(records.ssl, data, <int>length) != <int>length:
        return fail(records, WHY_OPENSSL)
    return 0


cdef size_t next_seal(const iovec *pieces, size_t nr_pieces, size_t piece, size_t inside) noexcept nogil:
    """Return how many bytes are encrypted before the next system call, from the place that `piece` and `inside` say."""
    cdef size_t left = 0
    while piece < nr_pieces and left <= SEAL_BYTES + REST_BYTES:
        left += pieces[piece].iov_len - inside
        inside = 0
        piece += 1
    # A reply of 256 KiB has a header: the last bytes of it would need a system call of their own, and wake the peer once more.
    return left if left <= SEAL_BYTES + REST_BYTES else SEAL_BYTES


cdef ssize_t seal_some(
    Records *records, const iovec *pieces, size_t nr_pieces, size_t *piece, size_t *inside
) noexcept nogil:
    """Encrypt `next_seal` bytes from the place that `piece` and `inside` say, and move it. Return how many, -1: see errno."""
    cdef size_t nr = 0, nr_joined = 0, step, left
    cdef size_t nr_max = next_seal(pieces, nr_pieces, piece[0], inside[0])
    cdef const uint8_t *data
    while piece[0] < nr_pieces and (nr < nr_max or not pieces[piece[0]].iov_len):
        data = <const uint8_t *>pieces[piece[0]].iov_base + inside[0]
        left = pieces[piece[0]].iov_len - inside[0]
        if not nr_joined and (left >= RECORD_BYTES or piece[0] + 1 == nr_pieces):
            step = min(left, nr_max - nr)
            if step and seal(records, data, step) < 0:
                return -1
        else:
            step = min(min(left, RECORD_BYTES - nr_joined), nr_max - nr)
            memcpy(records.joined + nr_joined, data, step)
            nr_joined += step
            if nr_joined == RECORD_BYTES:
                if seal(records, records.joined, nr_joined) < 0:
                    return -1
                nr_joined = 0
        nr += step
        inside[0] += step
        if inside[0] == pieces[piece[0]].iov_len:
            piece[0] += 1
            inside[0] = 0
    if nr_joined and seal(records, records.joined, nr_joined) < 0:
        return -1
    return <ssize_t>nr


cdef ssize_t tls_send(Records *records, const iovec *pieces, size_t nr_pieces) noexcept nogil:
    cdef size_t piece = 0, inside = 0, total = 0
    cdef ssize_t nr
    cdef int left
    if records.fd < 0:
        set_errno(EBADF)
        return -1
    left = drain(records)
    if left <= 0:
        if not left:
            set_errno(EAGAIN)
        return -1
    if records.sealed:
        for piece in range(nr_pieces):
            total += pieces[piece].iov_len
        if total < records.sealed:
            return fail(records, WHY_OTHERS)
        nr = <ssize_t>records.sealed
        records.sealed = 0
        return nr
    tls.ERR_clear_error()
    while piece < nr_pieces and total < SEND_BYTES:
        nr = seal_some(records, pieces, nr_pieces, &piece, &inside)
        if nr < 0:
            return -1
        left = drain(records)
        if left < 0:
            return -1
        if not left:
            records.sealed = <size_t>nr
            if not total:
                set_errno(EAGAIN)
                return -1
            return <ssize_t>total
        total += <size_t>nr
    return <ssize_t>total


# ---- for Python ----

@cython.no_gc_clear
cdef class TlsRecords:
    """What `take_over` returns: the records of one connection. See the module head.

    Its methods are those of `nbdtarget.common.tls_socket.TlsSocket`. Failures of TLS are what `make_error` makes of a reason.

    Attributes:
        has_pending, has_unsent, sealed: as there.
    """

    def __init__(self):
        raise TypeError("take_over makes it")

    def __dealloc__(self):
        self.detach()

    cdef void detach(self) noexcept:
        """OpenSSL uses the buffers no more."""
        if self.records.bio != NULL:
            tls.BIO_set_data(self.records.bio, NULL)
            tls.BIO_free(self.records.bio)
        free(self.records.incoming)
        free(self.records.outgoing)
        free(self.records.ahead)
        free(self.records.joined)
        memset(&self.records, 0, sizeof(Records))
        self.records.fd = -1

    def close(self):
        """The socket is closed. Idempotent."""
        self.detach()

    @property
    def has_pending(self):
        return tls_has_pending(&self.records)

    @property
    def has_unsent(self):
        return self.records.out_begin < self.records.out_end

    @property
    def sealed(self):
        return self.records.sealed

    @property
    def nr_spare_bytes(self):
        """For tests: of the buffers that only some connections need, and only at times."""
        return self.records.out_room + self.records.ahead_room

    cdef failure(self, int error):
        """Return the exception for an errno."""
        if error == EAGAIN:
            return BlockingIOError(error, os.strerror(error))
        if error != EPROTO:
            return OSError(error, os.strerror(error))
        return self.tls_failure()

    def tls_failure(self):
        """Return the exception for the last failure of TLS itself."""
        cdef const char *text
        if self.records.why == WHY_SILENT:
            return self.make_error("the peer sends much and says nothing")
        if self.records.why == WHY_ANSWERS:
            return self.make_error("the peer makes answers and does not read them")
        if self.records.why == WHY_OTHERS:
            return AssertionError("what was encrypted is not sent to its end")
        text = tls.ERR_reason_error_string(self.records.reason) if self.records.reason else NULL
        return self.make_error("the records fit no more" if text == NULL else text.decode("ascii", "replace"))

    def recv_into(self, view):
        """Receive as much as there is, up to the length of `view`; 0: the end. Raises: BlockingIOError, OSError."""
        cdef Py_buffer buffer
        cdef ssize_t nr
        cdef int error
        PyObject_GetBuffer(view, &buffer, PyBUF_WRITABLE)
        try:
            with nogil:
                nr = tls_receive(&self.records, buffer.buf, <size_t>buffer.len)
                error = errno
            if nr < 0:
                raise self.failure(error)
            return nr
        finally:
            PyBuffer_Release(&buffer)

    def peek(self, size_t size):
        """Return up to `size` bytes, which can still be received. Raises: BlockingIOError: there are none. OSError."""
        cdef ssize_t nr = 0
        cdef size_t kept = self.records.ahead_end - self.records.ahead_begin
        cdef void *larger
        size = min(size, <size_t>AHEAD_BYTES)
        if kept < size:
            if self.records.ahead_begin:
                memmove(self.records.ahead, self.records.ahead + self.records.ahead_begin, kept)
                self.records.ahead_begin, self.records.ahead_end = 0, kept
            if self.records.ahead_room < size:
                larger = realloc(self.records.ahead, size)
                if larger == NULL:
                    raise MemoryError
                self.records.ahead = <uint8_t *>larger
                self.records.ahead_room = size
            while self.records.ahead_end < size:
                nr = decrypt(
                    &self.records, self.records.ahead + self.records.ahead_end, size - self.records.ahead_end
                )
                if nr <= 0:
                    break
                self.records.ahead_end += <size_t>nr
            if nr < 0 and errno != EAGAIN:
                raise self.failure(errno)
            kept = self.records.ahead_end
        if not kept:
            free(self.records.ahead)
            self.records.ahead = NULL
            self.records.ahead_begin = self.records.ahead_end = self.records.ahead_room = 0
            raise BlockingIOError
        return (<uint8_t *>self.records.ahead + self.records.ahead_begin)[:min(size, kept)]

    def sendmsg(self, pieces):
        """Encrypt and send; return how many bytes have left whole. Raises: BlockingIOError, OSError."""
        cdef Py_buffer buffers[PIECES_MAX]
        cdef iovec places[PIECES_MAX]
        cdef size_t nr_pieces = 0, nr
        cdef ssize_t sent
        cdef int error
        try:
            for piece in pieces:
                if nr_pieces == PIECES_MAX:
                    break
                PyObject_GetBuffer(piece, &buffers[nr_pieces], PyBUF_SIMPLE)
                places[nr_pieces].iov_base = buffers[nr_pieces].buf
                places[nr_pieces].iov_len = <size_t>buffers[nr_pieces].len
                nr_pieces += 1
            with nogil:
                sent = tls_send(&self.records, places, nr_pieces)
                error = errno
            if sent < 0:
                raise self.failure(error)
            return sent
        finally:
            for nr in range(nr_pieces):
                PyBuffer_Release(&buffers[nr])

    def drain(self):
        """Send what is encrypted; return whether all of it has left. Raises: OSError."""
        cdef int left = 1
        if self.records.fd >= 0:
            left = drain(&self.records)
        if left < 0:
            raise self.failure(errno)
        return left == 1

    def put_unsent(self, bytes data not None):
        """For tests: bytes that wait for the socket, as if OpenSSL had written them."""
        if not has_room(&self.records, <size_t>len(data)):
            raise MemoryError
        memcpy(self.records.outgoing + self.records.out_end, <const char *>data, <size_t>len(data))
        self.records.out_end += <size_t>len(data)

    def take_unsent(self):
        """For tests: what waits for the socket, which will not get it."""
        cdef bytes data = (<uint8_t *>self.records.outgoing + self.records.out_begin)[
            :self.records.out_end - self.records.out_begin
        ]
        self.records.out_begin = self.records.out_end = 0
        return data

    def bound(self, size_t silent_max, size_t answers_max):
        """Set two bounds of `nbdtarget.common.tls_socket`, in bytes."""
        self.records.silent_max, self.records.answers_max = silent_max, answers_max


# ---- the SSL object of Python ----

cdef str refusal = None  # "": this module can be used


def why_not():
    """Return why Python's TLS cannot be used from here; "": it can. Found out once."""
    global refusal
    if refusal is None:
        refusal = find_out()
    return refusal


cdef str find_out():
    global method
    import ssl
    import sys

    import _ssl

    cdef void *library
    cdef bytes path
    cdef object thrown_away
    if sys.implementation.name != "cpython":
        return "this Python is not CPython"
    if not getattr(_ssl, "__file__", None):
        return "OpenSSL is a part of this Python"
    path = os.fsencode(_ssl.__file__)
    library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD)
    if library == NULL:
        return "Python's ssl module was not found in memory"
    if not find_functions(library):
        return "this Python hides the functions of OpenSSL"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    thrown_away = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="localhost")
    if ssl_in(getattr(thrown_away, "_sslobj", None), context) == NULL:
        return "the objects of this Python's ssl module are not known"
    method = tls.BIO_meth_new(tls.BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, b"nbdtarget")
    if method == NULL:
        return "OpenSSL has no memory"
    if not (
        tls.BIO_meth_set_create(method, bio_create) and tls.BIO_meth_set_read(method, bio_read)
        and tls.BIO_meth_set_write(method, bio_write) and tls.BIO_meth_set_ctrl(method, bio_ctrl)
    ):
        return "OpenSSL takes no BIO of ours"
    return ""


cdef bint find_functions(void *library) noexcept:
    """Find each function of `tls`. A name that is hidden leads nowhere."""
    cdef void **functions = <void **>&tls
    cdef const char *names[26]
    cdef int nr
    names[:] = [
        b"SSL_read", b"SSL_write", b"SSL_get_error", b"SSL_get_SSL_CTX", b"SSL_get_rbio", b"SSL_get_wbio", b"SSL_set_bio",
        b"BIO_get_new_index", b"BIO_meth_new", b"BIO_meth_set_read", b"BIO_meth_set_write", b"BIO_meth_set_ctrl",
        b"BIO_meth_set_create", b"BIO_new", b"BIO_free", b"BIO_up_ref", b"BIO_read", b"BIO_ctrl", b"BIO_set_data",
        b"BIO_get_data", b"BIO_set_init", b"BIO_set_flags", b"BIO_clear_flags", b"ERR_clear_error",
        b"ERR_peek_last_error", b"ERR_reason_error_string",
    ]
    if sizeof(tls) != sizeof(names):
        return False
    for nr in range(26):
        functions[nr] = dlsym(library, names[nr])
        if functions[nr] == NULL:
            return False
    return True


cdef void *ssl_in(object sslobj, object context) noexcept:
    """Return the SSL of an object of `_ssl`; NULL: it is not where it is expected. Reads no byte outside of the two objects."""
    cdef Py_ssize_t head = object.__basicsize__  # in front of the fields of its own
    cdef void **fields
    cdef void *ssl
    cdef void *ssl_ctx
    if type(sslobj).__basicsize__ < head + 3 * <Py_ssize_t>sizeof(void *):
        return NULL
    if type(context).__basicsize__ < head + <Py_ssize_t>sizeof(void *):
        return NULL
    fields = <void **>(<char *><PyObject *>sslobj + head)
    ssl = fields[1]
    ssl_ctx = (<void **>(<char *><PyObject *>context + head))[0]
    if fields[2] != <void *><PyObject *>context or ssl == NULL or ssl_ctx == NULL:
        return NULL
    if <uintptr_t>ssl % sizeof(void *) or <uintptr_t>ssl_ctx % sizeof(void *):
        return NULL
    return ssl if tls.SSL_get_SSL_CTX(ssl) == ssl_ctx else NULL


def take_over(ssl_object, int fd, make_error, size_t silent_max, size_t answers_max):
    """Go on with the records of a connection whose handshake is over, and all of whose encrypted bytes have left.

    Args:
        ssl_object: of `SSLContext.wrap_bio`; its own BIOs are not used any more.
        fd: of the socket; the caller's to close, after `close` of what is returned.
        make_error: makes an exception of a reason.
        silent_max, answers_max: see `nbdtarget.common.tls_socket`, in bytes.
    Returns a TlsRecords. None: that cannot be done here; nothing has changed.
    """
    cdef TlsRecords made
    cdef Records *records
    cdef void *ssl
    cdef void *incoming
    cdef int got
    if why_not():
        return None
    sslobj = getattr(ssl_object, "_sslobj", None)
    ssl = ssl_in(sslobj, ssl_object.context)
    if ssl == NULL:
        return None
    incoming = tls.SSL_get_rbio(ssl)
    if incoming == NULL or tls.BIO_ctrl(incoming, BIO_CTRL_PENDING, 0, NULL) > IN_BYTES:
        return None
    made = TlsRecords.__new__(TlsRecords)
    records = &made.records
    records.fd = -1
    made.sslobj, made.make_error = sslobj, make_error
    records.incoming = <uint8_t *>malloc(IN_BYTES)
    records.joined = <uint8_t *>malloc(RECORD_BYTES)
    records.bio = tls.BIO_new(method)
    if records.incoming == NULL or records.joined == NULL or records.bio == NULL:
        return None
    records.fd, records.ssl = fd, ssl
    records.silent_max, records.answers_max = silent_max, answers_max
    got = tls.BIO_read(incoming, records.incoming, IN_BYTES)
    records.in_end = <size_t>got if got > 0 else 0
    tls.BIO_set_data(records.bio, records)
    # OpenSSL takes one reference to a BIO that it reads from and writes to; the other one is ours.
    tls.BIO_up_ref(records.bio)
    tls.SSL_set_bio(ssl, records.bio, records.bio)
    tls.ERR_clear_error()
    return made
