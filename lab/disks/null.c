/* A null disk in C: what a server can reach on this machine when its language costs nothing.
 *
 * Its loop is that of ublk.py and of the kernel's own test server: one ring, one command for each tag, mapped
 * copy. Prints what `ublk.py null --json` prints of it and serves until it is killed. */
#include <fcntl.h>
#include <liburing.h>
#include <linux/ublk_cmd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { DEPTH = 128, LARGEST = 512 << 10 };

static struct io_uring control, ring;
static int control_fd, id = -1;

static int check(int result, const char *what)
{
	if (result < 0) {
		fprintf(stderr, "%s: %d\n", what, result);
		exit(1);
	}
	return result;
}

static int command(unsigned opcode, void *payload, int size, __u64 data)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&control);
	struct ublksrv_ctrl_cmd *cmd = (void *)sqe->cmd;
	struct io_uring_cqe *cqe;
	int result;

	io_uring_prep_rw(IORING_OP_URING_CMD, sqe, control_fd, NULL, 0, opcode);
	*cmd = (struct ublksrv_ctrl_cmd){ .dev_id = id, .queue_id = -1, .addr = (__u64)payload, .len = size,
					  .data = { data } };
	check(io_uring_submit_and_wait(&control, 1), "control");
	check(io_uring_wait_cqe(&control, &cqe), "control");
	result = cqe->res;
	io_uring_cqe_seen(&control, cqe);
	return result;
}

static void answer(int fd, unsigned opcode, unsigned tag, char *buffers, int result)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
	struct ublksrv_io_cmd *cmd = (void *)sqe->cmd;

	io_uring_prep_rw(IORING_OP_URING_CMD, sqe, fd, NULL, 0, opcode);
	sqe->user_data = tag;
	*cmd = (struct ublksrv_io_cmd){ .tag = tag, .result = result,
					.addr = (__u64)buffers + (__u64)tag * LARGEST };
}

static void serve(int fd, const struct ublksrv_io_desc *requests, char *buffers)
{
	unsigned ended = 0, head, seen;
	struct io_uring_cqe *cqe;

	while (ended < DEPTH) {
		io_uring_submit_and_wait(&ring, 1);
		seen = 0;
		io_uring_for_each_cqe(&ring, head, cqe) {
			unsigned tag = cqe->user_data;

			seen++;
			if (cqe->res == UBLK_IO_RES_OK)
				answer(fd, UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, buffers,
				       requests[tag].nr_sectors << 9);
			else
				ended++;
		}
		io_uring_cq_advance(&ring, seen);
	}
}

static void stop(int signal)
{
	(void)signal;
	command(UBLK_U_CMD_STOP_DEV, NULL, 0, 0);
}

int main(void)
{
	struct ublksrv_ctrl_dev_info info = { .nr_hw_queues = 1, .queue_depth = DEPTH, .dev_id = -1,
		.max_io_buf_bytes = LARGEST, .flags = UBLK_F_CMD_IOCTL_ENCODE | UBLK_F_NO_AUTO_PART_SCAN };
	struct ublk_params params = { .len = sizeof params, .types = UBLK_PARAM_TYPE_BASIC, .basic = {
		.logical_bs_shift = 9, .physical_bs_shift = 12, .io_min_shift = 12, .io_opt_shift = 12,
		.max_sectors = LARGEST >> 9, .dev_sectors = 1 << 21 } };
	size_t length = (DEPTH * sizeof(struct ublksrv_io_desc) + 4095) & ~4095ul;
	char path[32];
	int fd, tries = 1000;

	control_fd = check(open("/dev/ublk-control", O_RDWR), "/dev/ublk-control");
	check(io_uring_queue_init(8, &control, IORING_SETUP_SQE128), "io_uring_setup");
	check(io_uring_queue_init(DEPTH, &ring, IORING_SETUP_COOP_TASKRUN | IORING_SETUP_SINGLE_ISSUER |
				  IORING_SETUP_DEFER_TASKRUN), "io_uring_setup");
	check(command(UBLK_U_CMD_ADD_DEV, &info, sizeof info, 0), "ADD_DEV");
	id = info.dev_id;
	check(command(UBLK_U_CMD_SET_PARAMS, &params, sizeof params, 0), "SET_PARAMS");
	snprintf(path, sizeof path, "/dev/ublkc%d", id);
	while ((fd = open(path, O_RDWR)) < 0 && tries--)
		usleep(1000);
	void *requests = mmap(NULL, length, PROT_READ, MAP_SHARED, check(fd, path), 0);
	char *buffers = mmap(NULL, (size_t)DEPTH * LARGEST, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (unsigned tag = 0; tag < DEPTH; tag++)
		answer(fd, UBLK_U_IO_FETCH_REQ, tag, buffers, 0);
	io_uring_submit(&ring);
	check(command(UBLK_U_CMD_START_DEV, NULL, 0, getpid()), "START_DEV");
	signal(SIGTERM, stop);
	printf("{\"path\": \"/dev/ublkb%d\", \"flags\": []}\n", id);
	fflush(stdout);
	serve(fd, requests, buffers);
	munmap(requests, length);
	io_uring_queue_exit(&ring);
	close(fd);
	return check(command(UBLK_U_CMD_DEL_DEV, NULL, 0, 0), "DEL_DEV");
}
