/* SPDX-License-Identifier: Apache-2.0
 *
 * The floor of `make bench`: what the kernel alone charges for this work. An NBD server of one thread for each client
 * that makes the system calls and nothing else: it receives a batch, preads or pwrites for each request, and
 * sends once. It checks nothing, so it is no server for anybody's data.
 *
 *     cc -O2 -o floor bench_floor.c && ./floor SOCKET FILE
 */
#define _GNU_SOURCE
#include <endian.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BUFFER = 4 << 20, SLACK = 1 << 20, OPT_GO = 7, OPT_STRUCTURED_REPLY = 8 };
enum { READ = 0, WRITE = 1, DISC = 2, FLUSH = 3 };

static char received[BUFFER], replies[BUFFER];
static int client, file;
static uint64_t size;

static void need(char *to, size_t length)
{
    while (length) {
        ssize_t got = recv(client, to, length, 0);
        if (got <= 0)
            exit(0);
        to += got, length -= got;
    }
}

static void send_all(const char *from, size_t length)
{
    while (length) {
        ssize_t sent = send(client, from, length, MSG_NOSIGNAL);
        if (sent <= 0)
            exit(0);
        from += sent, length -= sent;
    }
}

/* Append a number of so many bytes, most significant first. */
static void put(char **to, uint64_t number, int bytes)
{
    while (bytes--)
        *(*to)++ = number >> 8 * bytes;
}

static void option_reply(uint32_t option, uint32_t kind, const char *data, uint32_t length)
{
    char *to = replies;
    put(&to, 0x3e889045565a9ULL, 8), put(&to, option, 4), put(&to, kind, 4), put(&to, length, 4);
    memcpy(to, data, length);
    send_all(replies, to + length - replies);
}

/* Returns whether replies are structured. */
static int handshake(void)
{
    int structured = 0;
    char *to = replies;
    memcpy(to, "NBDMAGICIHAVEOPT", 16), to += 16;
    put(&to, 3, 2); /* fixed newstyle, no zeroes */
    send_all(replies, to - replies);
    need(received, 4);
    for (;;) {
        uint32_t option, length;
        need(received, 16);
        memcpy(&option, received + 8, 4), memcpy(&length, received + 12, 4);
        option = be32toh(option), length = be32toh(length);
        if (length > BUFFER)
            exit(1);
        need(received, length);
        if (option == OPT_GO) {
            char info[12], *at = info;
            put(&at, 0, 2), put(&at, size, 8);
            put(&at, 1 | 4 | 8 | 256, 2); /* flags, FLUSH, FUA, multi-conn */
            option_reply(option, 3, info, sizeof info);
            option_reply(option, 1, "", 0);
            return structured;
        }
        if (option == OPT_STRUCTURED_REPLY) {
            structured = 1;
            option_reply(option, 1, "", 0);
        } else {
            option_reply(option, 0x80000001u, "", 0); /* unsupported */
        }
    }
}

static void serve(int structured)
{
    size_t have = 0;
    for (;;) {
        ssize_t got = recv(client, received + have, sizeof received - have, 0);
        if (got <= 0)
            exit(0);
        have += got;
        size_t at = 0, out = 0;
        while (have - at >= 28) {
            char *request = received + at, *reply = replies + out;
            uint16_t command;
            uint32_t length;
            uint64_t offset;
            memcpy(&command, request + 6, 2), memcpy(&offset, request + 16, 8), memcpy(&length, request + 24, 4);
            command = be16toh(command), offset = be64toh(offset), length = be32toh(length);
            if (command == DISC || length > SLACK / 2)
                exit(0);
            if (command == WRITE && have - at - 28 < length)
                break;
            at += 28;
            if (structured && command == READ) {
                uint32_t chunk = htobe32(length + 8);
                memcpy(reply, "\x66\x8e\x33\xef\0\1\0\1", 8), memcpy(reply + 8, request + 8, 8);
                memcpy(reply + 16, &chunk, 4), memcpy(reply + 20, request + 16, 8);
                out += 28;
            } else {
                memcpy(reply, "\x67\x44\x66\x98\0\0\0\0", 8), memcpy(reply + 8, request + 8, 8);
                out += 16;
            }
            if (command == READ) {
                if (pread(file, replies + out, length, offset) != length)
                    exit(1);
                out += length;
            } else if (command == WRITE) {
                if (pwrite(file, received + at, length, offset) != length)
                    exit(1);
                at += length;
            } else if (command == FLUSH && fdatasync(file)) {
                exit(1);
            }
            if (out > sizeof replies - SLACK)
                send_all(replies, out), out = 0;
        }
        if (out)
            send_all(replies, out);
        memmove(received, received + at, have - at);
        have -= at;
    }
}

/* A child's CPU time is counted here as soon as it is reaped, and not only when the next client comes. */
static void reap(int number)
{
    (void)number;
    while (waitpid(-1, NULL, WNOHANG) > 0)
        ;
}

int main(int argc, char **argv)
{
    struct sigaction action = {.sa_handler = reap, .sa_flags = SA_RESTART};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat status;
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), buffer = BUFFER;
    if (argc != 3 || strlen(argv[1]) >= sizeof address.sun_path)
        return 2;
    strcpy(address.sun_path, argv[1]);
    file = open(argv[2], O_RDWR);
    if (file < 0 || fstat(file, &status))
        return 1;
    size = status.st_size;
    unlink(argv[1]);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 5))
        return 1;
    sigaction(SIGCHLD, &action, NULL);
    while ((client = accept(listener, NULL, NULL)) >= 0) {
        if (fork()) {
            close(client);
            continue;
        }
        setsockopt(client, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
        setsockopt(client, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
        serve(handshake());
    }
    return 1;
}
