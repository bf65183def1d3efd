/* nbdattach: attach an export to a kernel NBD device by netlink, and hand it a new connection whenever one dies.
 *
 *   nbdattach HOST PORT EXPORT INDEX CONNECTIONS TIMEOUT DEAD
 *
 * /dev/nbdINDEX gets CONNECTIONS connections. A request that is not answered for TIMEOUT seconds is sent again, over
 * another connection; while there is none, requests wait up to DEAD seconds for a new one. Both are needed to ride
 * through a restart of the server, and nbd-client 3.24 can set only the first. Returns when the device is attached and
 * leaves a child behind that watches it, and ends with it (nbd-client -d).
 */
#include <arpa/inet.h>
#include <endian.h>
#include <linux/genetlink.h>
#include <linux/nbd-netlink.h>
#include <linux/netlink.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST_CONNECTIONS 16
#define OPTION_REPLY 0x3e889045565a9ULL
#define AGAIN_AFTER 100000 /* microseconds between two tries to connect */

struct export { uint64_t size; uint16_t flags; };

static struct sockaddr_in server = {.sin_family = AF_INET};
static const char *name;
static uint16_t family; /* the kernel's number for "nbd" messages */
static uint32_t group;  /* and for their multicasts */
static union { struct nlmsghdr header; char bytes[8192]; } message;

static void give_up(const char *why) { fprintf(stderr, "nbdattach: %s\n", why); exit(1); }

/* ---- the NBD handshake */

/* Nothing is not asked for: the kernel would wait for something to come. */
static int receive(int fd, void *into, size_t length) {
    return !length || recv(fd, into, length, MSG_WAITALL) == (ssize_t)length;
}

static int negotiate(int fd, struct export *found) {
    char greeting[18];
    uint32_t flags = htobe32(3); /* fixed newstyle, no zeroes */
    uint32_t length = strlen(name);
    struct { char magic[8]; uint32_t option, length, name_length; } __attribute__((packed)) go =
        {"IHAVEOPT", htobe32(7), htobe32(length + 6), htobe32(length)};
    uint16_t nothing_more = 0;
    if (!receive(fd, greeting, sizeof greeting) || memcmp(greeting, "NBDMAGICIHAVEOPT", 16)) return 0;
    if (send(fd, &flags, 4, MSG_NOSIGNAL) != 4 || send(fd, &go, sizeof go, MSG_NOSIGNAL) != sizeof go) return 0;
    if (send(fd, name, length, MSG_NOSIGNAL) != length || send(fd, &nothing_more, 2, MSG_NOSIGNAL) != 2) return 0;
    for (;;) {
        struct { uint64_t magic; uint32_t option, kind, length; } __attribute__((packed)) reply;
        struct { uint16_t kind; uint64_t size; uint16_t flags; char rest[4096]; } __attribute__((packed)) info;
        if (!receive(fd, &reply, sizeof reply) || be64toh(reply.magic) != OPTION_REPLY) return 0;
        if (be32toh(reply.length) > sizeof info || !receive(fd, &info, be32toh(reply.length))) return 0;
        if (be32toh(reply.kind) == 1) return 1;
        if (be32toh(reply.kind) >> 31) give_up("the server has no such export");
        if (be32toh(reply.kind) == 3 && be16toh(info.kind) == 0)
            *found = (struct export){be64toh(info.size), be16toh(info.flags)};
    }
}

/* A connection that is ready for requests, or -1. */
static int dial(struct export *found) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(fd, (struct sockaddr *)&server, sizeof server) == 0 && negotiate(fd, found)) return fd;
    close(fd);
    return -1;
}

/* ---- netlink */

static int open_netlink(void) {
    struct sockaddr_nl here = {.nl_family = AF_NETLINK};
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC);
    if (bind(fd, (struct sockaddr *)&here, sizeof here)) give_up("no netlink");
    return fd;
}

static void start(uint16_t kind, uint8_t command) {
    struct genlmsghdr *generic = NLMSG_DATA(&message.header);
    memset(&message, 0, sizeof message);
    message.header.nlmsg_len = NLMSG_LENGTH(GENL_HDRLEN);
    message.header.nlmsg_type = kind;
    message.header.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
    generic->cmd = command;
    generic->version = 1;
}

static struct nlattr *put(int kind, const void *value, int length) {
    struct nlattr *attribute = (void *)(message.bytes + message.header.nlmsg_len);
    attribute->nla_type = kind;
    attribute->nla_len = NLA_HDRLEN + length;
    if (length) memcpy((char *)attribute + NLA_HDRLEN, value, length);
    message.header.nlmsg_len += NLA_ALIGN(attribute->nla_len);
    return attribute;
}

static void put_u32(int kind, uint32_t value) { put(kind, &value, sizeof value); }
static void put_u64(int kind, uint64_t value) { put(kind, &value, sizeof value); }

/* What was put since `outer` is inside of it. */
static void end(struct nlattr *outer) { outer->nla_len = message.bytes + message.header.nlmsg_len - (char *)outer; }

static void put_sockets(const int *fds, int count) {
    struct nlattr *all = put(NBD_ATTR_SOCKETS | NLA_F_NESTED, NULL, 0);
    for (int i = 0; i < count; i++) {
        struct nlattr *one = put(NBD_SOCK_ITEM | NLA_F_NESTED, NULL, 0);
        put_u32(NBD_SOCK_FD, fds[i]);
        end(one);
    }
    end(all);
}

/* The two numbers, wherever in the answer they are nested. */
static void find_family(const char *at, const char *stop) {
    while (stop - at >= NLA_HDRLEN) {
        const struct nlattr *attribute = (const void *)at;
        const char *value = at + NLA_HDRLEN, *over = at + attribute->nla_len;
        if (attribute->nla_len < NLA_HDRLEN) return;
        if (attribute->nla_type == CTRL_ATTR_FAMILY_ID) family = *(const uint16_t *)value;
        if (attribute->nla_type == CTRL_ATTR_MCAST_GROUPS)
            for (value += NLA_HDRLEN; value < over; value += NLA_ALIGN(((const struct nlattr *)value)->nla_len))
                if ((((const struct nlattr *)value)->nla_type & NLA_TYPE_MASK) == CTRL_ATTR_MCAST_GRP_ID)
                    group = *(const uint32_t *)(value + NLA_HDRLEN);
        at += NLA_ALIGN(attribute->nla_len);
    }
}

/* Send the message; 0, or an error number below 0. */
static int ask(int netlink) {
    if (send(netlink, &message, message.header.nlmsg_len, 0) < 0) return -1;
    for (;;) {
        int length = recv(netlink, &message, sizeof message, 0);
        struct nlmsghdr *header = &message.header;
        if (length < 0) return -1;
        for (; NLMSG_OK(header, (unsigned)length); header = NLMSG_NEXT(header, length)) {
            if (header->nlmsg_type == NLMSG_ERROR) return ((struct nlmsgerr *)NLMSG_DATA(header))->error;
            if (header->nlmsg_type == GENL_ID_CTRL)
                find_family((char *)NLMSG_DATA(header) + GENL_HDRLEN, (char *)header + header->nlmsg_len);
        }
    }
}

/* Replace connections as they die, until the device takes no more. */
static void watch(int events, int netlink, uint32_t index) {
    struct { struct nlmsghdr header; struct genlmsghdr generic; char rest[4096]; } event;
    while (recv(events, &event, sizeof event, 0) > 0) {
        struct export ignored;
        int fd, error;
        if (event.header.nlmsg_type != family || event.generic.cmd != NBD_CMD_LINK_DEAD) continue;
        while ((fd = dial(&ignored)) < 0) usleep(AGAIN_AFTER);
        start(family, NBD_CMD_RECONFIGURE);
        put_u32(NBD_ATTR_INDEX, index);
        put_sockets(&fd, 1);
        error = ask(netlink);
        close(fd);
        printf("@@ nbdattach: a connection died, a new one was %s\n", error ? "refused" : "taken");
        fflush(stdout);
    }
}

int main(int count, char **words) {
    int netlink = open_netlink(), events = open_netlink(), fds[MOST_CONNECTIONS];
    struct export found = {0, 0};
    if (count != 8) give_up("HOST PORT EXPORT INDEX CONNECTIONS TIMEOUT DEAD");
    inet_pton(AF_INET, words[1], &server.sin_addr);
    server.sin_port = htons(atoi(words[2]));
    name = words[3];
    int index = atoi(words[4]), connections = atoi(words[5]);
    if (connections < 1 || connections > MOST_CONNECTIONS) give_up("1 to 16 connections");

    start(GENL_ID_CTRL, CTRL_CMD_GETFAMILY);
    put(CTRL_ATTR_FAMILY_NAME, NBD_GENL_FAMILY_NAME, sizeof NBD_GENL_FAMILY_NAME);
    if (ask(netlink) || !family) give_up("this kernel has no nbd");
    setsockopt(events, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof group);

    for (int i = 0; i < connections; i++)
        if ((fds[i] = dial(&found)) < 0) give_up("cannot connect");
    start(family, NBD_CMD_CONNECT);
    put_u32(NBD_ATTR_INDEX, index);
    put_u64(NBD_ATTR_SIZE_BYTES, found.size);
    put_u64(NBD_ATTR_BLOCK_SIZE_BYTES, 512);
    put_u64(NBD_ATTR_SERVER_FLAGS, found.flags);
    put_u64(NBD_ATTR_TIMEOUT, atoi(words[6]));
    put_u64(NBD_ATTR_DEAD_CONN_TIMEOUT, atoi(words[7]));
    put_sockets(fds, connections);
    if (ask(netlink)) give_up("the device refuses");
    for (int i = 0; i < connections; i++) close(fds[i]);
    if (fork() == 0) {
        setsid();
        watch(events, netlink, index);
    }
    return 0;
}
