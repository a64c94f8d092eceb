# SPDX-License-Identifier: Apache-2.0
"""The C side of `nbdtarget_tls`, for `nbdtarget_fast`: records without a Python object, and without the interpreter's lock."""

from libc.stdint cimport uint8_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef struct Records:
    # The encrypted half of a connection. Places are [begin, end) of a buffer.
    int fd
    void *ssl
    void *bio  # what OpenSSL reads from and writes to: the two buffers that follow
    uint8_t *incoming  # received, and not yet taken by OpenSSL
    size_t in_begin
    size_t in_end
    uint8_t *outgoing  # encrypted, and not yet taken by the socket
    size_t out_begin
    size_t out_end
    size_t out_room
    uint8_t *ahead  # decrypted by a peek
    size_t ahead_begin
    size_t ahead_end
    size_t ahead_room
    uint8_t *joined  # pieces that share a record
    size_t sealed  # bytes that are encrypted and have not left whole
    size_t nr_silent  # encrypted bytes since the last one that was decrypted
    size_t silent_max
    size_t answers_max
    bint is_end  # the stream of the peer has ended
    bint is_full  # the last record may not have been read to its end
    bint is_more_likely  # the last receive was as long as it may be
    int why  # the last failure: see `Why`
    unsigned long reason  # of OpenSSL

# As recv: the number of bytes, 0: the end, -1: see errno. EPROTO: TLS has failed.
cdef ssize_t tls_receive(Records *records, void *into, size_t length) noexcept nogil
# As writev: how many bytes have left whole, -1: see errno. After EAGAIN, or a part: the next call must begin with the same bytes.
cdef ssize_t tls_send(Records *records, const iovec *pieces, size_t nr_pieces) noexcept nogil

cdef inline bint tls_has_pending(const Records *records) noexcept nogil:
    """Whether bytes may be had without the socket being readable."""
    return records.is_full or records.in_begin < records.in_end or records.ahead_begin < records.ahead_end

cdef class TlsRecords:
    cdef Records records
    cdef object sslobj  # owns `ssl`
    cdef object make_error
    cdef void detach(self) noexcept
    cdef failure(self, int error)
