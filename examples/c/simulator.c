/*
 * A simulator in C that has the engine inside: a live update of its devices over its own RAM.
 *
 * usage: simulator [-n DEVICES] [-m MIB] [-r RAMFILE] [-f DEVICE] [-w THREADS] [-s]
 *
 * The RAM is a file that the simulator maps, and that the engine is given; the devices have 32
 * bytes of registers each. The driver's callbacks are functions of this file: they save the
 * registers, patch them at the last moment, and compare in the next kernel. A subsystem keeps a
 * page of its own. With -s the simulator owns time: it takes the callbacks one by one and says what
 * each costs. With -f the callback of one device fails, and everything is rolled back. With -w the
 * driver's callbacks run in several threads.
 *
 * cc $(pkg-config --cflags luo) simulator.c $(pkg-config --libs luo)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "luo.h"

enum {
	REGS = 32,		/* bytes of registers a device */
	PER_BRIDGE = 64,	/* devices below a bridge */
	TICKS_PAGE = 4096
};

struct simulator {
	int32_t nr_devices;
	int32_t nr_bridges;
	int32_t fail_at;	/* device whose PREPARE fails, or -1 */
	int workers;
	int64_t now;		/* simulated time, ns */
	int64_t nr_calls[5];	/* by event */
	uint8_t *regs;
	uint8_t *stopped;
	uint8_t *ram;
	uint64_t ticks;
};

static void die(const char *what, int rc)
{
	fprintf(stderr, "%s: %d, %s\n", what, rc, luo_last_error());
	exit(1);
}

static void must(const char *what, int rc)
{
	if (rc < 0)
		die(what, rc);
}

/* ---- the driver ---- */

static int save(struct luo_device *dev, void *ctx)
{
	struct simulator *sim = ctx;
	int32_t index = luo_device_index(dev);
	size_t nbytes;
	void *slot = luo_device_slot(dev, &nbytes);

	if (index == sim->fail_at)
		return -EBUSY;
	memcpy(slot, luo_device_column(dev, "regs", NULL), nbytes);
	__atomic_fetch_add(&sim->nr_calls[LUO_PREPARE], 1, __ATOMIC_RELAXED);
	return 0;
}

static int stop(struct luo_device *dev, void *ctx)
{
	struct simulator *sim = ctx;
	uint8_t *slot = luo_device_slot(dev, NULL);

	sim->stopped[luo_device_index(dev)] = 1;
	slot[0] ^= 0xff;	/* what changed since PREPARE */
	__atomic_fetch_add(&sim->nr_calls[LUO_REBOOT], 1, __ATOMIC_RELAXED);
	return 0;
}

static int resume(struct luo_device *dev, void *ctx)
{
	struct simulator *sim = ctx;
	int32_t index = luo_device_index(dev);
	const uint8_t *regs = luo_device_column(dev, "regs", NULL);
	const uint8_t *slot = luo_device_slot(dev, NULL);

	if ((slot[0] ^ regs[0]) != 0xff || memcmp(slot + 1, regs + 1, REGS - 1))
		return -EIO;
	sim->stopped[index] = 0;
	__atomic_fetch_add(&sim->nr_calls[LUO_RESTORE], 1, __ATOMIC_RELAXED);
	return luo_device_reclaim(dev);
}

static int count(struct luo_device *dev, void *ctx)
{
	struct simulator *sim = ctx;

	sim->stopped[luo_device_index(dev)] = 0;
	__atomic_fetch_add(&sim->nr_calls[luo_device_event(dev)], 1, __ATOMIC_RELAXED);
	return 0;
}

/* ---- a subsystem: the guests' timer, which has a page that is kept ---- */

static int timer_prepare(struct luo_context *context, void *ctx)
{
	(void)ctx;
	return luo_alloc_preserve(context->kernel, TICKS_PAGE, &context->data);
}

static int timer_reboot(struct luo_context *context, void *ctx)
{
	struct simulator *sim = ctx;

	memcpy(sim->ram + context->data, &sim->ticks, sizeof(sim->ticks));
	return 0;
}

static int timer_cancel(struct luo_context *context, void *ctx)
{
	(void)ctx;
	return luo_unpreserve_free(context->kernel, context->data);
}

static int timer_restore(struct luo_context *context, void *ctx)
{
	struct simulator *sim = ctx;

	return memcmp(sim->ram + context->data, &sim->ticks, sizeof(sim->ticks)) ? -EIO : 0;
}

static int timer_finish(struct luo_context *context, void *ctx)
{
	(void)ctx;
	return luo_restore_free(context->kernel, context->data);
}

/* ---- the machine and its kernels ---- */

static void add_devices(struct simulator *sim, struct luo_machine *machine)
{
	int32_t i, total = sim->nr_bridges + sim->nr_devices;
	const char **names = calloc(total, sizeof(*names));
	const char **buses = calloc(total, sizeof(*buses));
	const char **drivers = calloc(total, sizeof(*drivers));
	int32_t *parents = calloc(total, sizeof(*parents));
	uint64_t *offsets = calloc(total + 1, sizeof(*offsets));
	char (*text)[24] = calloc(total, sizeof(*text));
	struct luo_column column = { .name = "regs", .offsets = offsets };
	struct luo_devices devices = { .count = total, .columns = &column, .nr_columns = 1 };

	sim->regs = calloc(sim->nr_devices, REGS);
	sim->stopped = calloc(total, 1);
	for (i = 0; i < sim->nr_devices * REGS; i++)
		sim->regs[i] = (uint8_t)(i / REGS * 7 + i % REGS);
	for (i = 0; i < total; i++) {
		int bridge = i < sim->nr_bridges;

		snprintf(text[i], sizeof(text[i]), "%s%d", bridge ? "bridge" : "dev",
			 bridge ? i : i - sim->nr_bridges);
		names[i] = text[i];
		buses[i] = "pci";
		drivers[i] = bridge ? "pcieport" : "sim";
		parents[i] = bridge ? -1 : (i - sim->nr_bridges) / PER_BRIDGE;
		offsets[i + 1] = offsets[i] + (bridge ? 0 : REGS);
	}
	devices.names = names;
	devices.buses = buses;
	devices.drivers = drivers;
	devices.parents = parents;
	column.data = sim->regs;
	must("add_devices", luo_machine_add_devices(machine, &devices, NULL));
	free(names);
	free(buses);
	free(drivers);
	free(parents);
	free(offsets);
	free(text);
}

static int64_t simulated_time(void *ctx)
{
	struct simulator *sim = ctx;

	return sim->now;
}

static struct luo_kernel *new_kernel(struct simulator *sim, struct luo_machine *machine, int steps)
{
	struct luo_ops driver = {
		.prepare = save, .reboot = stop, .restore = resume, .finish = count,
		.cancel = count, .ctx = sim, .state_size = REGS, .thread_safe = 1
	};
	struct luo_ops nothing = { 0 };
	struct luo_subsystem timer = {
		.name = "timer", .priority = LUO_AFTER_DEVICES, .prepare = timer_prepare,
		.reboot = timer_reboot, .cancel = timer_cancel, .restore = timer_restore,
		.finish = timer_finish, .ctx = sim
	};
	struct luo_options options = {
		.workers = sim->workers, .clock = steps ? simulated_time : NULL, .clock_ctx = sim
	};
	struct luo_kernel *kernel;

	must("kernel_new", luo_kernel_new(machine, &options, &kernel));
	must("add_driver", luo_kernel_add_driver(kernel, "sim", &driver));
	must("add_driver", luo_kernel_add_driver(kernel, "pcieport", &nothing));
	must("add_bus", luo_kernel_add_bus(kernel, "pci", &nothing));
	must("add_subsystem", luo_kernel_add_subsystem(kernel, &timer));
	return kernel;
}

/* ---- live update ---- */

static int show_state(struct luo_kernel *kernel)
{
	static const char *const names[] = { "normal", "prepared", "updated" };
	int state;

	must("state", luo_state(kernel, &state));
	printf("state %s\n", names[state]);
	return state;
}

static int32_t flags_set(struct simulator *sim, struct luo_kernel *kernel, int flag)
{
	int32_t i, total = sim->nr_bridges + sim->nr_devices, set = 0;
	uint8_t *flags = malloc(total);

	must("flags", luo_flags(kernel, flag, flags, total));
	for (i = 0; i < total; i++)
		set += flags[i];
	free(flags);
	return set;
}

/* One event, callback by callback: time passes as the simulator says. */
static int step_through(struct simulator *sim, struct luo_kernel *kernel, int event)
{
	struct luo_step step;
	int rc = luo_begin(kernel, event);

	while (!rc && !(rc = luo_next(kernel, &step)) && step.kind != LUO_STEP_END) {
		int64_t ns = step.kind == LUO_STEP_SUBSYSTEM ? 5000 : 800;

		sim->now += ns;
		rc = luo_complete(&step, ns);
	}
	return rc;
}

static int run_event(struct simulator *sim, struct luo_kernel *kernel, int event, int steps)
{
	if (steps)
		return step_through(sim, kernel, event);
	return event == LUO_PREPARE ? luo_prepare(kernel) : luo_finish(kernel, NULL);
}

static void show_costs(struct luo_kernel *kernel)
{
	struct luo_cost rows[32];
	int32_t i, nr;

	must("profile", luo_profile(kernel, rows, 32, &nr));
	for (i = 0; i < nr && i < 32; i++)
		fprintf(stderr, "%-8s %-10s %-10s %7llu calls, %9.3f ms\n", rows[i].event,
			rows[i].kind, rows[i].name, (unsigned long long)rows[i].calls,
			(double)rows[i].total_ns / 1e6);
}

int main(int argc, char **argv)
{
	struct simulator sim = { .nr_devices = 100000, .fail_at = -1, .ticks = 0x1234 };
	struct luo_handover handover;
	struct luo_machine *machine;
	struct luo_kernel *old, *next;
	const char *file = NULL;
	uint64_t nbytes = 256;
	int option, fd, rc, steps = 0;
	int32_t fail = -1;

	while ((option = getopt(argc, argv, "n:m:r:f:w:s")) != -1) {
		switch (option) {
		case 'n': sim.nr_devices = atoi(optarg); break;
		case 'm': nbytes = strtoull(optarg, NULL, 0); break;
		case 'r': file = optarg; break;
		case 'f': fail = atoi(optarg); break;
		case 'w': sim.workers = atoi(optarg); break;
		case 's': steps = 1; break;
		default: return 2;
		}
	}
	nbytes <<= 20;
	sim.nr_bridges = (sim.nr_devices + PER_BRIDGE - 1) / PER_BRIDGE;
	if (fail >= 0)
		sim.fail_at = sim.nr_bridges + fail;

	rc = luo_init(LUO_ABI);
	if (rc != LUO_ABI)
		die("luo_init", rc);

	/* The simulator's own RAM. */
	fd = file ? open(file, O_RDWR) : memfd_create("ram", MFD_CLOEXEC);
	if (fd < 0 || ftruncate(fd, (off_t)nbytes) < 0) {
		perror(file ? file : "memfd");
		return 1;
	}
	sim.ram = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (sim.ram == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	must("machine_new", luo_machine_new(&machine));
	must("add_ram", luo_machine_add_ram(machine, 0, nbytes, fd, 0, 0));
	add_devices(&sim, machine);

	old = new_kernel(&sim, machine, steps);
	next = new_kernel(&sim, machine, steps);
	must("boot", luo_boot(old, NULL));
	must("request", luo_request(old, "*", 1));
	must("kexec_load", luo_kexec_load(old, next));
	show_state(old);

	rc = run_event(&sim, old, LUO_PREPARE, steps);
	printf("prepare %d\n", rc);
	if (show_state(old) == LUO_PREPARED) {
		printf("preserved %d\n", flags_set(&sim, old, LUO_PRESERVED));
		must("kexec", steps ? step_through(&sim, old, LUO_KEXEC) : luo_kexec(old));
		printf("the old kernel: %d\n", luo_get_handover(old, &handover));
		show_state(next);
		printf("reclaimed %d\n", flags_set(&sim, next, LUO_RECLAIMED));
		printf("finish %d\n", run_event(&sim, next, LUO_FINISH, steps));
		show_state(next);
		show_costs(next);
	}
	printf("calls %lld %lld %lld %lld %lld\n", (long long)sim.nr_calls[LUO_PREPARE],
	       (long long)sim.nr_calls[LUO_REBOOT], (long long)sim.nr_calls[LUO_RESTORE],
	       (long long)sim.nr_calls[LUO_FINISH], (long long)sim.nr_calls[LUO_CANCEL]);
	if (steps)
		printf("simulated %lld ns\n", (long long)sim.now);

	must("kernel_free", luo_kernel_free(old));
	must("kernel_free", luo_kernel_free(next));
	must("machine_free", luo_machine_free(machine));
	munmap(sim.ram, nbytes);
	close(fd);
	free(sim.regs);
	free(sim.stopped);
	return 0;
}
