/* SPDX-License-Identifier: Apache-2.0
 *
 * A client of `scripts.bench_durable`: 4 KiB writes that have to be on the disk before the next one.
 *
 * fio's nbd engine sends no FUA, so this does. It keeps DEPTH lanes busy over one connection. In a lane one thing
 * follows the other, as in a database that commits:
 *
 *     fua      a WRITE with FUA at a random place; its reply; the next
 *     flush    a WRITE, its reply, a FLUSH, its reply; the next
 *
 * It prints the writes that became durable, the seconds, and the 50th and 99th percentile of what one took in
 * microseconds.
 *
 *     cc -O2 -o durable bench_durable.c && ./durable SOCKET EXPORT fua|flush DEPTH SECONDS
 */
#include <endian.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, LANES_MAX = 256, TIMES_MAX = 1 << 20, OPT_GO = 7, REP_ACK = 1, REP_INFO = 3 };
enum { WRITE = 1, DISC = 2, FLUSH = 3, FLAG_FUA = 1, CAN_FLUSH = 1 << 2, CAN_FUA = 1 << 3 };
enum { HEADER = 28, REPLY = 16 };

struct lane {
    int flushes;
    double begin;
};

static struct lane lanes[LANES_MAX];
static char out[LANES_MAX * (HEADER + BLOCK)], in[LANES_MAX * REPLY], block[BLOCK];
static float times_us[TIMES_MAX];
static int server, is_fua;
static uint64_t size;

static void fail(const char *why)
{
    fprintf(stderr, "%s\n", why);
    exit(1);
}

static void need(void *to, size_t length)
{
    for (size_t have = 0; have < length;) {
        ssize_t got = recv(server, (char *)to + have, length - have, 0);
        if (got <= 0)
            fail("the server closed the connection");
        have += got;
    }
}

static void send_all(const char *from, size_t length)
{
    while (length) {
        ssize_t sent = send(server, from, length, MSG_NOSIGNAL);
        if (sent <= 0)
            fail("the server takes no more");
        from += sent, length -= sent;
    }
}

/* Append a number of so many bytes, most significant first. */
static void put(char **to, uint64_t number, int bytes)
{
    while (bytes--)
        *(*to)++ = number >> 8 * bytes;
}

static uint64_t number(const char *from, int bytes)
{
    uint64_t value = 0;
    while (bytes--)
        value = value << 8 | (unsigned char)*from++;
    return value;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void negotiate(const char *export)
{
    char greeting[18], reply[20], info[4096], *to = out;
    need(greeting, sizeof greeting);
    put(&to, greeting[17] & 3, 4);
    memcpy(to, "IHAVEOPT", 8), to += 8;
    put(&to, OPT_GO, 4), put(&to, 6 + strlen(export), 4), put(&to, strlen(export), 4);
    memcpy(to, export, strlen(export)), to += strlen(export);
    put(&to, 0, 2);
    send_all(out, to - out);
    for (;;) {
        need(reply, sizeof reply);
        uint64_t kind = number(reply + 12, 4), length = number(reply + 16, 4);
        if ((kind != REP_ACK && kind != REP_INFO) || length > sizeof info)
            fail("the server refuses the export");
        need(info, length);
        if (kind == REP_ACK)
            return;
        if (length == 12 && number(info, 2) == 0) {
            size = number(info + 2, 8);
            if (~number(info + 10, 2) & (CAN_FLUSH | CAN_FUA))
                fail("the server offers no FLUSH and FUA");
        }
    }
}

static void ask(char **to, int nr, int command, int flags, uint64_t offset, uint32_t length)
{
    put(to, 0x25609513, 4), put(to, flags, 2), put(to, command, 2), put(to, nr, 8);
    put(to, offset, 8), put(to, length, 4);
    if (command == WRITE)
        memcpy(*to, block, length), *to += length;
}

static void write_somewhere(char **to, int nr)
{
    uint64_t place = ((uint64_t)random() << 31 | random()) % (size / BLOCK);
    lanes[nr].begin = now();
    lanes[nr].flushes = 0;
    ask(to, nr, WRITE, is_fua ? FLAG_FUA : 0, place * BLOCK, BLOCK);
}

static int by_size(const void *one, const void *other)
{
    float a = *(const float *)one, b = *(const float *)other;
    return (a > b) - (a < b);
}

int main(int argc, char **argv)
{
    if (argc != 6)
        fail("usage: durable SOCKET EXPORT fua|flush DEPTH SECONDS");
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
    server = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(server, (void *)&address, sizeof address))
        fail("nobody listens there");
    is_fua = !strcmp(argv[3], "fua");
    int depth = atoi(argv[4]);
    if (depth < 1 || depth > LANES_MAX)
        fail("a depth from 1 to 256");
    negotiate(argv[2]);
    srandom((unsigned)(now() * 1e6));
    for (int at = 0; at < BLOCK; at++)
        block[at] = random();

    double begin = now(), end = begin + atof(argv[5]), last = begin;
    char *to = out;
    for (int nr = 0; nr < depth; nr++)
        write_somewhere(&to, nr);
    int busy = depth;
    size_t have = 0;
    long durable = 0;
    while (busy) {
        send_all(out, to - out);
        to = out;
        ssize_t got = recv(server, in + have, sizeof in - have, 0);
        if (got <= 0)
            fail("the server closed the connection");
        have += got, last = now();
        size_t used = 0;
        for (; have - used >= REPLY; used += REPLY) {
            if (number(in + used, 4) != 0x67446698 || number(in + used + 4, 4))
                fail("a request failed");
            int nr = number(in + used + 8, 8);
            if (!is_fua && !lanes[nr].flushes) {
                lanes[nr].flushes = 1;
                ask(&to, nr, FLUSH, 0, 0, 0);
                continue;
            }
            times_us[durable++ % TIMES_MAX] = (last - lanes[nr].begin) * 1e6;
            if (last < end)
                write_somewhere(&to, nr);
            else
                busy--;
        }
        have -= used;
        memmove(in, in + used, have);
    }
    ask(&to, 0, DISC, 0, 0, 0);
    send_all(out, to - out);
    long known = durable < TIMES_MAX ? durable : TIMES_MAX;
    qsort(times_us, known, sizeof *times_us, by_size);
    printf("%ld %.6f %.1f %.1f\n", durable, last - begin, times_us[known / 2], times_us[known * 99 / 100]);
    return 0;
}
