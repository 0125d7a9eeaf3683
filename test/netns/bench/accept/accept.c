/*
 * accept: the least that a program on libnetfilter_queue can do with first
 * packets. It reads each packet's id and accepts it with a mark; it looks at
 * nothing else and decides nothing. One process for each queue.
 *
 *	accept FIRST NUMBER MARK [BATCH]
 *
 * It stands as the bench's baseline, written as the library's own example
 * (nf-queue.c) and manual say: one receive and one send for a packet. Like the
 * gateway it has a queue of 4096 packets, a receive buffer to match, GSO and a
 * copy range of headers.
 *
 * With BATCH it is as quick as the kernel's interface lets a program be that
 * treats all packets alike: it reads as many as that while there are any, and
 * accepts them with one message (NFQNL_MSG_VERDICT_BATCH: everything up to the
 * last id). Who decides cannot do that.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <libmnl/libmnl.h>
#include <libnetfilter_queue/libnetfilter_queue.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { copy_range = 128, queue_length = 4096, receive_buffer = 16 << 20 };

static struct mnl_socket *sock;
static unsigned int mark, batch = 1, waiting, last;
static unsigned int queue_number;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static int packet(const struct nlmsghdr *h, void *unused)
{
	struct nlattr *attr[NFQA_MAX + 1] = {0};
	struct nfqnl_msg_packet_hdr *p;

	(void)unused;
	if (nfq_nlmsg_parse(h, attr) < 0 || !attr[NFQA_PACKET_HDR])
		return MNL_CB_ERROR;
	p = mnl_attr_get_payload(attr[NFQA_PACKET_HDR]);

	last = ntohl(p->packet_id);
	waiting++;
	return MNL_CB_OK;
}

static void release(void)
{
	char buf[MNL_SOCKET_BUFFER_SIZE];
	int type = waiting > 1 ? NFQNL_MSG_VERDICT_BATCH : NFQNL_MSG_VERDICT;
	struct nlmsghdr *v = nfq_nlmsg_put(buf, type, queue_number);

	nfq_nlmsg_verdict_put(v, last, NF_ACCEPT);
	nfq_nlmsg_verdict_put_mark(v, mark);
	if (mnl_socket_sendto(sock, v, v->nlmsg_len) < 0)
		fail("send a verdict");
	waiting = 0;
}

static void take(unsigned int queue)
{
	static char buf[0xffff + 8192];
	int on = 1, size = receive_buffer;
	unsigned int port;

	sock = mnl_socket_open(NETLINK_NETFILTER);
	if (!sock || mnl_socket_bind(sock, 0, MNL_SOCKET_AUTOPID) < 0)
		fail("open a netlink socket");
	port = mnl_socket_get_portid(sock);
	queue_number = queue;
	mnl_socket_setsockopt(sock, NETLINK_NO_ENOBUFS, &on, sizeof on);
	setsockopt(mnl_socket_get_fd(sock), SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);

	struct nlmsghdr *h = nfq_nlmsg_put(buf, NFQNL_MSG_CONFIG, queue);
	nfq_nlmsg_cfg_put_cmd(h, AF_INET, NFQNL_CFG_CMD_BIND);
	if (mnl_socket_sendto(sock, h, h->nlmsg_len) < 0)
		fail("bind the queue");
	h = nfq_nlmsg_put(buf, NFQNL_MSG_CONFIG, queue);
	nfq_nlmsg_cfg_put_params(h, NFQNL_COPY_PACKET, copy_range);
	nfq_nlmsg_cfg_put_qmaxlen(h, queue_length);
	mnl_attr_put_u32(h, NFQA_CFG_FLAGS, htonl(NFQA_CFG_F_GSO));
	mnl_attr_put_u32(h, NFQA_CFG_MASK, htonl(NFQA_CFG_F_GSO));
	if (mnl_socket_sendto(sock, h, h->nlmsg_len) < 0)
		fail("set the queue up");
	for (;;) {
		/* Between the packets of a batch it does not wait. */
		ssize_t n = recv(mnl_socket_get_fd(sock), buf, sizeof buf, waiting ? MSG_DONTWAIT : 0);

		if (n < 0 && errno == EAGAIN) {
			release();
			continue;
		}
		if (n < 0 && errno != EINTR && errno != ENOBUFS)
			fail("receive");
		if (n > 0 && mnl_cb_run(buf, n, 0, port, packet, NULL) < 0)
			fail("read a message");
		if (waiting >= batch)
			release();
	}
}

int main(int argc, char **argv)
{
	if (argc != 4 && argc != 5) {
		fprintf(stderr, "usage: accept FIRST NUMBER MARK [BATCH]\n");
		return 2;
	}
	int first = atoi(argv[1]), number = atoi(argv[2]);

	mark = strtoul(argv[3], NULL, 0);
	if (argc == 5)
		batch = atoi(argv[4]);
	for (int i = 1; i < number; i++) {
		pid_t parent = getpid(), child = fork();

		if (child < 0)
			fail("fork");
		if (child == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (getppid() != parent)
				return 1;
			take(first + i);
		}
	}
	take(first);
}
