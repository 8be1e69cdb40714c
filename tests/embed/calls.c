/* Calls of luo_embed.h that must come out in one way: "calls NAME" makes those of one test. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "luo.h"

#define MIB (1ull << 20)
#define RAM (64 * MIB)

static int failures;

static void expect(int line, const char *what, long long got, long long wanted)
{
	if (got == wanted)
		return;
	failures++;
	printf("%d: %s is %lld, not %lld (%s)\n", line, what, got, wanted, luo_last_error());
}

#define EXPECT(call, wanted) expect(__LINE__, #call, (long long)(call), (long long)(wanted))
#define OK(call) EXPECT(call, 0)

static void says(int line, const char *text)
{
	if (strstr(luo_last_error(), text))
		return;
	failures++;
	printf("%d: '%s' is not in '%s'\n", line, text, luo_last_error());
}

#define SAYS(text) says(__LINE__, text)

/* ---- a small machine: a root and four devices below it, 8 bytes of state each ---- */

static uint8_t state_of[5 * 8];
static int calls_of[5];
static int deaf;	/* device that does not reclaim, -1 none */

static int save(struct luo_device *dev, void *ctx)
{
	size_t nbytes;
	void *slot = luo_device_slot(dev, &nbytes);

	memcpy(slot, luo_device_column(dev, "state", NULL), nbytes);
	__atomic_fetch_add(&calls_of[luo_device_event(dev)], 1, __ATOMIC_RELAXED);
	return ctx ? *(int *)ctx : 0;
}

static int load(struct luo_device *dev, void *ctx)
{
	size_t nbytes;
	void *slot = luo_device_slot(dev, &nbytes);

	(void)ctx;
	__atomic_fetch_add(&calls_of[luo_device_event(dev)], 1, __ATOMIC_RELAXED);
	if (memcmp(slot, luo_device_column(dev, "state", NULL), nbytes))
		return -EIO;
	return luo_device_index(dev) == deaf ? 0 : luo_device_reclaim(dev);
}

static struct luo_machine *machine_without_ram(void)
{
	static const char *const names[] = { "root", "a", "b", "c", "d" };
	static const char *const buses[] = { "pci", "pci", "pci", "pci", "pci" };
	static const char *const drivers[] = { NULL, "nic", "nic", "nic", "nic" };
	static const int32_t parents[] = { -1, 0, 0, 0, 0 };
	struct luo_column state = { .name = "state", .data = state_of, .width = 8 };
	struct luo_devices devices = {
		.count = 5, .names = names, .parents = parents, .buses = buses,
		.drivers = drivers, .columns = &state, .nr_columns = 1
	};
	struct luo_machine *machine = NULL;
	int32_t first = -1;
	int i;

	deaf = -1;
	memset(calls_of, 0, sizeof(calls_of));
	for (i = 0; i < (int)sizeof(state_of); i++)
		state_of[i] = (uint8_t)(i + 1);
	OK(luo_machine_new(&machine));
	OK(luo_machine_add_devices(machine, &devices, &first));
	EXPECT(first, 0);
	return machine;
}

static int memory_file(uint64_t nbytes)
{
	int fd = memfd_create("ram", MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, (off_t)nbytes) < 0)
		exit(3);
	return fd;
}

static struct luo_machine *small_machine(void)
{
	struct luo_machine *machine = machine_without_ram();
	int fd = memory_file(RAM);

	OK(luo_machine_add_ram(machine, 0, RAM, fd, 0, 0));
	close(fd);	/* the engine has its own */
	return machine;
}

static struct luo_kernel *kernel_with(struct luo_machine *machine, const struct luo_options *options,
				      int *rc)
{
	struct luo_ops nic = {
		.prepare = save, .restore = load, .ctx = rc, .state_column = "state",
		.thread_safe = 1
	};
	struct luo_ops none = { 0 };
	struct luo_kernel *kernel = NULL;

	OK(luo_kernel_new(machine, options, &kernel));
	OK(luo_kernel_add_driver(kernel, "nic", &nic));
	OK(luo_kernel_add_bus(kernel, "pci", &none));
	return kernel;
}

static struct luo_kernel *small_kernel(struct luo_machine *machine)
{
	return kernel_with(machine, NULL, NULL);
}

static int state(struct luo_kernel *kernel)
{
	int found = -1, rc = luo_state(kernel, &found);

	return rc < 0 ? rc : found;
}

static void update(struct luo_machine *machine)
{
	struct luo_kernel *old = small_kernel(machine), *next = small_kernel(machine);
	int32_t unreclaimed = -1;

	OK(luo_boot(old, NULL));
	OK(luo_request(old, "*", 1));
	OK(luo_kexec_load(old, next));
	OK(luo_prepare(old));
	EXPECT(state(old), LUO_PREPARED);
	OK(luo_kexec(old));
	EXPECT(state(old), -ESHUTDOWN);
	EXPECT(state(next), LUO_UPDATED);
	OK(luo_finish(next, &unreclaimed));
	EXPECT(unreclaimed, 0);
	EXPECT(state(next), LUO_NORMAL);
	EXPECT(calls_of[LUO_PREPARE], 4);
	EXPECT(calls_of[LUO_RESTORE], 4);
	OK(luo_kernel_free(old));
	OK(luo_kernel_free(next));
	OK(luo_machine_free(machine));
}

/* ---- tests ---- */

static void test_handles(void)
{
	struct luo_machine *machine = small_machine();
	struct luo_kernel *kernel = small_kernel(machine), *late;

	EXPECT(luo_machine_free(machine), -EBUSY);
	EXPECT(luo_machine_add_ram(machine, RAM, MIB, 0, 0, 0), -EBUSY);
	EXPECT(luo_machine_free((struct luo_machine *)kernel), -EBADF);
	EXPECT(luo_boot((struct luo_kernel *)machine, NULL), -EBADF);
	EXPECT(luo_boot((struct luo_kernel *)0x12345678, NULL), -EBADF);
	EXPECT(state(kernel), -EOPNOTSUPP);
	SAYS("neither booted nor");
	OK(luo_kernel_free(kernel));
	EXPECT(luo_kernel_free(kernel), -EBADF);
	SAYS("luo_kernel_free: no kernel: it was freed");
	EXPECT(luo_boot(kernel, NULL), -EBADF);
	EXPECT(luo_next(kernel, &(struct luo_step){ 0 }), -EBADF);
	OK(luo_machine_free(machine));
	EXPECT(luo_machine_free(machine), -EBADF);
	EXPECT(luo_kernel_new(machine, NULL, &late), -EBADF);
}

static void test_null(void)
{
	struct luo_machine *machine = small_machine();
	struct luo_kernel *kernel = small_kernel(machine);
	struct luo_devices devices = { .count = 1 };
	struct luo_handover handover;
	const char *const unnamed[] = { NULL };
	int32_t number;
	char path[8];

	OK(luo_boot(kernel, NULL));
	EXPECT(luo_machine_new(NULL), -EINVAL);
	SAYS("luo_machine_new: machine is NULL");
	EXPECT(luo_machine_free(NULL), -EINVAL);
	EXPECT(luo_machine_bytes(machine, 0, 8, NULL), -EINVAL);
	EXPECT(luo_machine_add_devices(machine, NULL, NULL), -EINVAL);
	EXPECT(luo_machine_add_devices(machine, &devices, NULL), -EINVAL);
	devices.names = unnamed;
	EXPECT(luo_machine_add_devices(machine, &devices, NULL), -EINVAL);
	devices.count = -1;
	EXPECT(luo_machine_add_devices(machine, &devices, NULL), -EINVAL);
	EXPECT(luo_machine_find(machine, NULL, &number), -EINVAL);
	EXPECT(luo_machine_find(machine, "root/x", &number), -ENOENT);
	OK(luo_machine_find(machine, "root/c", &number));
	EXPECT(number, 3);
	OK(luo_machine_path(machine, 3, path, sizeof(path)));
	EXPECT(strcmp(path, "root/c"), 0);
	EXPECT(luo_machine_path(machine, 3, path, 6), -ENAMETOOLONG);
	EXPECT(luo_machine_path(machine, 99, path, 8), -ENOENT);
	EXPECT(luo_kernel_new(machine, NULL, NULL), -EINVAL);
	EXPECT(luo_state(kernel, NULL), -EINVAL);
	EXPECT(luo_request(kernel, NULL, 1), -EINVAL);
	EXPECT(luo_request_devices(kernel, NULL, 1, 1), -EINVAL);
	EXPECT(luo_request_devices(kernel, &number, -1, 1), -EINVAL);
	number = 77;
	EXPECT(luo_request_devices(kernel, &number, 1, 1), -ENOENT);
	EXPECT(luo_flags(kernel, 3, (uint8_t *)path, 5), -EINVAL);
	EXPECT(luo_flags(kernel, 0, (uint8_t *)path, 6), -EINVAL);
	EXPECT(luo_flags(kernel, 0, NULL, 5), -EINVAL);
	EXPECT(luo_profile(kernel, NULL, 4, &number), -EINVAL);
	EXPECT(luo_profile(kernel, NULL, -1, &number), -EINVAL);
	OK(luo_profile(kernel, NULL, 0, &number));
	EXPECT(luo_get_handover(kernel, NULL), -EINVAL);
	EXPECT(luo_handover_to_setup_data(NULL, 0, path), -EINVAL);
	EXPECT(luo_handover_from_setup_data(path, 8, &handover), -EBADMSG);
	EXPECT(luo_alloc_pages(kernel, 0, &(uint64_t){ 0 }), -EINVAL);
	EXPECT(luo_alloc_pages(kernel, 1ull << 60, &(uint64_t){ 0 }), -ENOMEM);
	EXPECT(luo_claim(kernel, 4096, -1), -EINVAL);
	EXPECT(luo_claim(kernel, 1, 0), -EINVAL);
	EXPECT(luo_restore_free(kernel, 4096), -ENOENT);
	OK(luo_kernel_free(kernel));
	OK(luo_machine_free(machine));
}

static void test_ram(void)
{
	struct luo_machine *machine = machine_without_ram();
	struct luo_kernel *kernel;
	int fd = memory_file(RAM), other = memory_file(RAM);
	char *page = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	EXPECT(luo_kernel_new(machine, NULL, &kernel), -EINVAL);
	SAYS("it has no RAM");
	EXPECT(luo_machine_add_ram(machine, 0, RAM, -1, 0, 0), -EBADF);
	EXPECT(luo_machine_add_ram(machine, 0, 0, fd, 0, 0), -EINVAL);
	EXPECT(luo_machine_add_ram(machine, 0, 4097, fd, 0, 0), -EINVAL);
	EXPECT(luo_machine_add_ram(machine, 7, 4096, fd, 0, 0), -EINVAL);
	EXPECT(luo_machine_add_ram(machine, 0, 4096, fd, 7, 0), -EINVAL);
	EXPECT(luo_machine_add_ram(machine, 0, 4096, fd, RAM, 0), -EINVAL);
	EXPECT(luo_machine_add_ram(machine, 0, UINT64_MAX, fd, 0, 0), -EINVAL);
	EXPECT(luo_machine_add_ram(machine, ~4095ull, 8192, fd, 0, 0), -EINVAL);
	EXPECT(luo_machine_add_ram(machine, 0, RAM, fd, 0, -1), -EINVAL);
	EXPECT(luo_machine_add_host_ram(machine, 0, RAM, NULL, 0), -EINVAL);
	EXPECT(luo_machine_add_host_ram(machine, 0, 4096, page + 1, 0), -EINVAL);
	OK(luo_machine_add_ram(machine, 0, RAM, fd, 0, 0));
	EXPECT(luo_machine_add_ram(machine, RAM - 4096, 8192, other, 0, 0), -EINVAL);
	SAYS("overlaps");
	EXPECT(luo_machine_add_host_ram(machine, RAM, RAM, page, 0), -EINVAL);
	SAYS("beside RAM by fd");
	OK(luo_machine_free(machine));

	machine = machine_without_ram();
	OK(luo_machine_add_host_ram(machine, 0, RAM / 2, page, 0));
	EXPECT(luo_machine_add_host_ram(machine, RAM, 4096, page + RAM / 2, 0), -EINVAL);
	SAYS("different distances");
	EXPECT(luo_machine_add_ram(machine, RAM, RAM, fd, 0, 0), -EINVAL);
	OK(luo_machine_free(machine));
	munmap(page, RAM);
	close(fd);
	close(other);
}

/* Below and above a hole, as on a PC: one file, whose second half is mapped higher up. */
static void test_split_ram(void)
{
	struct luo_machine *machine = machine_without_ram();
	int fd = memory_file(RAM);
	char *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	void *high, *low;

	OK(luo_machine_add_ram(machine, 1ull << 32, RAM / 2, fd, RAM / 2, 1));
	OK(luo_machine_add_ram(machine, 0, RAM / 2, fd, 0, 0));
	OK(luo_machine_bytes(machine, 1ull << 32, 4096, &high));
	OK(luo_machine_bytes(machine, 4096, 4096, &low));
	EXPECT(luo_machine_bytes(machine, RAM / 2, 4096, &low), -EINVAL);
	strcpy(high, "high");
	strcpy(low, "low");
	EXPECT(strcmp(ram + RAM / 2, "high"), 0);
	EXPECT(strcmp(ram + 4096, "low"), 0);
	update(machine);
	munmap(ram, RAM);
	close(fd);
}

/* The same in two files that have nothing to do with each other. */
static void test_two_files(void)
{
	struct luo_machine *machine = machine_without_ram();
	int one = memory_file(RAM), two = memory_file(RAM);

	OK(luo_machine_add_ram(machine, 0, RAM, one, 0, 0));
	OK(luo_machine_add_ram(machine, RAM, RAM, two, 0, 0));
	update(machine);
	close(one);
	close(two);
}

/* Memory of this process without a file, with a hole in it that nobody may touch. */
static void test_host_ram(void)
{
	struct luo_machine *machine = machine_without_ram();
	char *ram = mmap(NULL, 2 * RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct luo_kernel *kernel, *next;
	void *bytes;

	mprotect(ram + RAM / 2, RAM / 2, PROT_NONE);
	OK(luo_machine_add_host_ram(machine, MIB, RAM / 2, ram, 0));
	OK(luo_machine_add_host_ram(machine, MIB + RAM, RAM, ram + RAM, 0));
	OK(luo_machine_bytes(machine, MIB + 4096, 8, &bytes));
	EXPECT((char *)bytes == ram + 4096, 1);
	kernel = small_kernel(machine);
	OK(luo_boot(kernel, NULL));
	EXPECT(luo_kexec_load_image(kernel, "luo.drivers:kernel", &next), -EOPNOTSUPP);
	SAYS("it has no file");
	OK(luo_kernel_free(kernel));
	update(machine);
	munmap(ram, 2 * RAM);
}

static void test_kernels(void)
{
	struct luo_machine *machine = small_machine();
	struct luo_kernel *kernel = small_kernel(machine), *other, *none = NULL;
	struct luo_ops ops = { 0 };
	struct luo_options wrong = { .kho_abi = "kho-v99" };
	struct luo_subsystem subsystem = { .name = "kvm", .priority = 7 };

	EXPECT(luo_kernel_new(machine, &wrong, &none), -EINVAL);
	wrong = (struct luo_options){ .workers = -1 };
	EXPECT(luo_kernel_new(machine, &wrong, &none), -EINVAL);
	wrong = (struct luo_options){ .callback_limit_ns = -1 };
	EXPECT(luo_kernel_new(machine, &wrong, &none), -EINVAL);
	EXPECT(none == NULL, 1);
	EXPECT(luo_kernel_add_driver(kernel, "nic", &ops), -EEXIST);
	EXPECT(luo_kernel_add_driver(kernel, "", &ops), -EINVAL);
	EXPECT(luo_kernel_add_subsystem(kernel, &subsystem), -EINVAL);
	subsystem.priority = LUO_WITH_DEVICES;
	OK(luo_kernel_add_subsystem(kernel, &subsystem));
	EXPECT(luo_kernel_add_subsystem(kernel, &subsystem), -EEXIST);
	OK(luo_kernel_add_driver(kernel, "not for update", NULL));
	OK(luo_boot(kernel, NULL));
	EXPECT(luo_boot(kernel, NULL), -EBUSY);
	EXPECT(luo_kernel_add_driver(kernel, "late", &ops), -EBUSY);
	EXPECT(luo_kernel_add_bus(kernel, "late", &ops), -EBUSY);
	other = small_kernel(machine);
	EXPECT(luo_boot(other, NULL), -EBUSY);
	SAYS("runs on this machine");
	EXPECT(luo_cancel(kernel), -EINVAL);
	EXPECT(luo_finish(kernel, NULL), -EINVAL);
	EXPECT(luo_reboot(kernel), -EINVAL);
	EXPECT(luo_kexec(kernel), -EINVAL);
	EXPECT(luo_kexec_load(kernel, kernel), -EINVAL);
	OK(luo_kexec_load(kernel, other));
	OK(luo_kexec_load(kernel, NULL));	/* drops it */
	EXPECT(state(other), -ESHUTDOWN);
	OK(luo_request(kernel, "*", 1));
	OK(luo_prepare(kernel));
	EXPECT(luo_prepare(kernel), -EINVAL);
	EXPECT(luo_request(kernel, "*", 0), -EINVAL);
	OK(luo_cancel(kernel));
	OK(luo_kernel_free(other));
	OK(luo_kernel_free(kernel));
	OK(luo_machine_free(machine));
}

static void test_callback_errno(void)
{
	struct luo_machine *machine = small_machine();
	uint8_t preserved[5];
	int rc = 0;
	struct luo_kernel *kernel = kernel_with(machine, NULL, &rc);

	OK(luo_boot(kernel, NULL));
	OK(luo_request(kernel, "*", 1));
	rc = -ENODEV;
	EXPECT(luo_prepare(kernel), -ENODEV);
	SAYS("PREPARE driver nic of root/a: returned -19");
	rc = 3;
	EXPECT(luo_prepare(kernel), -EINVAL);
	EXPECT(state(kernel), LUO_NORMAL);
	OK(luo_flags(kernel, LUO_PRESERVED, preserved, 5));
	EXPECT(preserved[1], 0);
	rc = 0;
	OK(luo_prepare(kernel));
	OK(luo_flags(kernel, LUO_PRESERVED, preserved, 5));
	EXPECT(preserved[0] + preserved[1] + preserved[4], 3);
	OK(luo_kernel_free(kernel));
	OK(luo_machine_free(machine));
}

static int deadlocks(struct luo_context *context, void *ctx)
{
	int *found = ctx, now;

	found[0] = luo_cancel(context->kernel);
	found[1] = luo_request(context->kernel, "*", 0);
	found[2] = luo_kexec(context->kernel);
	found[3] = luo_state(context->kernel, &now);
	return -ECANCELED;
}

static void test_reentry(void)
{
	struct luo_machine *machine = small_machine();
	struct luo_kernel *kernel = small_kernel(machine);
	int found[4] = { 0 };
	struct luo_subsystem subsystem = { .name = "x", .prepare = deadlocks, .ctx = found };

	OK(luo_kernel_add_subsystem(kernel, &subsystem));
	OK(luo_boot(kernel, NULL));
	EXPECT(luo_prepare(kernel), -ECANCELED);
	SAYS("subsystem x: returned -125");
	EXPECT(found[0], -EDEADLK);
	EXPECT(found[1], -EDEADLK);
	EXPECT(found[2], -EDEADLK);
	EXPECT(found[3], 0);
	OK(luo_kernel_free(kernel));
	OK(luo_machine_free(machine));
}

static int keep(struct luo_context *context, void *ctx)
{
	uint64_t *seen = ctx;

	if (context->event == LUO_PREPARE)
		context->data = 0xdead0000beef;
	seen[context->event] = context->data;
	return 0;
}

/* REBOOT, and a jump that the program makes itself, by the setup_data node. */
static void test_handover(void)
{
	struct luo_machine *machine = small_machine();
	struct luo_kernel *old = small_kernel(machine), *next = small_kernel(machine);
	struct luo_handover handover, again;
	uint8_t node[48], wrong[48] = { 0 };
	uint64_t seen[5] = { 0 };
	struct luo_subsystem subsystem = {
		.name = "x", .prepare = keep, .reboot = keep, .restore = keep, .finish = keep,
		.ctx = seen
	};

	OK(luo_kernel_add_subsystem(old, &subsystem));
	OK(luo_kernel_add_subsystem(next, &subsystem));
	OK(luo_boot(old, NULL));
	OK(luo_request(old, "root/[ab]", 1));
	OK(luo_prepare(old));
	OK(luo_reboot(old));
	EXPECT(luo_reboot(old), -EALREADY);
	OK(luo_get_handover(old, &handover));
	OK(luo_handover_to_setup_data(&handover, 0x1122, node));
	EXPECT(node[0], 0x22);
	EXPECT(luo_handover_from_setup_data(wrong, 48, &again), -EBADMSG);
	OK(luo_handover_from_setup_data(node, 48, &again));
	OK(memcmp(&handover, &again, sizeof(again)));
	OK(luo_kernel_free(old));
	OK(luo_boot(next, &again));
	EXPECT(state(next), LUO_UPDATED);
	EXPECT(calls_of[LUO_RESTORE], 2);
	EXPECT(seen[LUO_RESTORE], 0xdead0000beef);
	EXPECT(seen[LUO_REBOOT], 0xdead0000beef);
	OK(luo_finish(next, NULL));
	EXPECT(seen[LUO_FINISH], 0xdead0000beef);
	OK(luo_kernel_free(next));
	OK(luo_machine_free(machine));
}

/* The next kernel in a process of its own, with drivers in Python; C callbacks before the jump. */
static void test_image(void)
{
	struct luo_machine *machine = small_machine();
	struct luo_kernel *old = small_kernel(machine), *next = NULL;
	struct luo_cost rows[8];
	struct luo_handover handover;
	uint8_t reclaimed[5] = { 0 };
	int32_t unreclaimed = -1, nr = 0;

	OK(luo_boot(old, NULL));
	OK(luo_request(old, "*", 1));
	EXPECT(luo_kexec_load_image(old, "no colon", &next), -EINVAL);
	EXPECT(luo_kexec_load_image(old, "luo.nowhere:kernel", &next), -ENOEXEC);
	EXPECT(next == NULL, 1);
	OK(luo_kexec_load_image(old, "luo.drivers:kernel", &next));
	EXPECT(state(next), -EOPNOTSUPP);
	OK(luo_prepare(old));
	OK(luo_kexec(old));
	EXPECT(state(old), -ESHUTDOWN);
	EXPECT(state(next), LUO_UPDATED);
	OK(luo_flags(next, LUO_RECLAIMED, reclaimed, 5));
	EXPECT(reclaimed[0] + reclaimed[4], 2);
	EXPECT(luo_begin(next, LUO_FINISH), -EOPNOTSUPP);
	EXPECT(luo_get_handover(next, &handover), -EOPNOTSUPP);
	OK(luo_finish(next, &unreclaimed));
	EXPECT(unreclaimed, 0);
	OK(luo_profile(next, rows, 8, &nr));
	EXPECT(nr > 0, 1);
	EXPECT(calls_of[LUO_PREPARE], 4);
	EXPECT(calls_of[LUO_RESTORE], 0);
	OK(luo_request(next, "root/a", 1));
	OK(luo_prepare(next));
	OK(luo_cancel(next));
	OK(luo_kernel_free(next));
	OK(luo_kernel_free(old));
	OK(luo_machine_free(machine));
}

static void test_unreclaimed(void)
{
	struct luo_machine *machine = small_machine();
	struct luo_kernel *old = small_kernel(machine), *next = small_kernel(machine);
	int32_t unreclaimed = 0;

	deaf = 2;
	OK(luo_boot(old, NULL));
	OK(luo_request(old, "*", 1));
	OK(luo_kexec_load(old, next));
	OK(luo_prepare(old));
	OK(luo_kexec(old));
	OK(luo_finish(next, &unreclaimed));
	EXPECT(unreclaimed, 1);
	OK(luo_kernel_free(next));
	OK(luo_kernel_free(old));
	OK(luo_machine_free(machine));
}

static void test_steps(void)
{
	struct luo_machine *machine = small_machine();
	int rc = 0;
	struct luo_kernel *kernel = kernel_with(machine, NULL, &rc);
	struct luo_step step, before;

	OK(luo_boot(kernel, NULL));
	OK(luo_request(kernel, "*", 1));
	EXPECT(luo_next(kernel, &step), -EINVAL);
	EXPECT(luo_abort(kernel), -EINVAL);
	EXPECT(luo_begin(kernel, LUO_FINISH), -EINVAL);
	EXPECT(luo_begin(kernel, LUO_RESTORE), -EINVAL);
	EXPECT(luo_begin(kernel, 99), -EINVAL);

	OK(luo_begin(kernel, LUO_PREPARE));
	EXPECT(luo_begin(kernel, LUO_PREPARE), -EDEADLK);
	EXPECT(luo_prepare(kernel), -EDEADLK);
	EXPECT(luo_request(kernel, "*", 0), -EDEADLK);
	EXPECT(state(kernel), LUO_NORMAL);
	OK(luo_next(kernel, &step));
	EXPECT(step.number, 1);
	EXPECT(step.kind, LUO_STEP_DRIVER);
	EXPECT(strcmp(step.name, "nic"), 0);
	EXPECT(step.device, 1);
	EXPECT(step.devices, 1);
	EXPECT(calls_of[LUO_PREPARE], 0);
	EXPECT(luo_next(kernel, &step), -EBUSY);
	OK(luo_complete(&step, 100));
	EXPECT(calls_of[LUO_PREPARE], 1);
	EXPECT(luo_complete(&step, 100), -EALREADY);
	before = step;
	OK(luo_next(kernel, &step));
	EXPECT(luo_complete(&before, 1), -EALREADY);
	OK(luo_abort(kernel));
	EXPECT(luo_complete(&step, 1), -EALREADY);
	EXPECT(state(kernel), LUO_NORMAL);

	/* a failure ends the event, and rolls it back */
	OK(luo_begin(kernel, LUO_PREPARE));
	OK(luo_next(kernel, &step));
	OK(luo_complete(&step, 100));
	OK(luo_next(kernel, &step));
	rc = -ENXIO;
	EXPECT(luo_complete(&step, 100), -ENXIO);
	EXPECT(luo_next(kernel, &step), -EINVAL);
	EXPECT(state(kernel), LUO_NORMAL);
	rc = 0;

	/* freed in the middle */
	OK(luo_begin(kernel, LUO_PREPARE));
	OK(luo_next(kernel, &step));
	OK(luo_kernel_free(kernel));
	EXPECT(luo_complete(&step, 100), -EBADF);
	OK(luo_machine_free(machine));
}

static void run_steps(struct luo_kernel *kernel, int event, int64_t ns)
{
	struct luo_step step;

	OK(luo_begin(kernel, event));
	while (!luo_next(kernel, &step) && step.kind != LUO_STEP_END)
		OK(luo_complete(&step, ns * step.device));
}

static int64_t ticking(void *ctx)
{
	return *(int64_t *)ctx += 7;
}

/* What steps are said to cost is what the profile says; otherwise it is the clock's. */
static void test_costs(void)
{
	struct luo_machine *machine = small_machine();
	int64_t now = 0;
	struct luo_options options = { .clock = ticking, .clock_ctx = &now };
	struct luo_kernel *old = kernel_with(machine, &options, NULL);
	struct luo_kernel *next = kernel_with(machine, &options, NULL);
	struct luo_cost rows[8];
	struct luo_phase phases[16];
	int32_t nr = 0, i, seen = 0;

	OK(luo_boot(old, NULL));
	OK(luo_request(old, "*", 1));
	OK(luo_kexec_load(old, next));
	run_steps(old, LUO_PREPARE, 1000);
	OK(luo_profile(old, rows, 8, &nr));
	EXPECT(nr, 1);
	EXPECT(strcmp(rows[0].subsystem, "devices"), 0);
	EXPECT(strcmp(rows[0].event, "PREPARE"), 0);
	EXPECT(rows[0].calls, 4);
	EXPECT(rows[0].total_ns, 10000);
	EXPECT(rows[0].min_ns, 1000);
	EXPECT(rows[0].max_ns, 4000);
	run_steps(old, LUO_REBOOT, 1000);
	OK(luo_kexec(old));		/* REBOOT has run */
	EXPECT(state(next), LUO_UPDATED);
	OK(luo_profile(next, rows, 8, &nr));
	EXPECT(nr, 1);
	EXPECT(strcmp(rows[0].event, "RESTORE"), 0);
	EXPECT(rows[0].total_ns, 4 * 7);
	EXPECT(luo_begin(old, LUO_KEXEC), -ESHUTDOWN);
	OK(luo_profile(old, NULL, 0, &nr));
	EXPECT(nr, 1);
	OK(luo_phases(next, phases, 16, &nr));
	for (i = 0; i < nr; i++)
		if (!strcmp(phases[i].name, "blackout") || !strcmp(phases[i].name, "restore")) {
			seen++;
			EXPECT(phases[i].ns > 0 && phases[i].ns % 7 == 0 && phases[i].ns <= now, 1);
		}
	EXPECT(seen, 2);
	OK(luo_kernel_free(old));
	OK(luo_kernel_free(next));
	OK(luo_machine_free(machine));
}

/* The whole blackout one callback at a time: also what the next kernel restores. */
static void test_kexec_steps(void)
{
	struct luo_machine *machine = small_machine();
	struct luo_kernel *old = small_kernel(machine), *next = small_kernel(machine);
	struct luo_cost row;
	struct luo_step step;
	int32_t nr = 0;

	OK(luo_boot(old, NULL));
	OK(luo_request(old, "*", 1));
	EXPECT(luo_begin(old, LUO_KEXEC), -EINVAL);
	SAYS("no kernel is loaded");
	OK(luo_kexec_load(old, next));
	OK(luo_prepare(old));
	run_steps(old, LUO_KEXEC, 1000);
	EXPECT(state(old), -ESHUTDOWN);
	EXPECT(state(next), LUO_UPDATED);
	EXPECT(calls_of[LUO_RESTORE], 4);
	OK(luo_profile(next, &row, 1, &nr));
	EXPECT(nr, 1);
	EXPECT(row.total_ns, 10000);
	EXPECT(luo_next(old, &step), -EINVAL);
	OK(luo_finish(next, NULL));

	/* ended early, behind the jump: the rest is done */
	OK(luo_kernel_free(old));
	old = next;
	next = small_kernel(machine);
	OK(luo_request(old, "*", 1));
	OK(luo_kexec_load(old, next));
	OK(luo_prepare(old));
	OK(luo_begin(old, LUO_KEXEC));
	OK(luo_next(old, &step));
	OK(luo_complete(&step, 5));
	OK(luo_abort(old));
	EXPECT(state(old), -ESHUTDOWN);
	EXPECT(state(next), LUO_UPDATED);
	EXPECT(calls_of[LUO_RESTORE], 8);
	OK(luo_kernel_free(next));
	OK(luo_kernel_free(old));
	OK(luo_machine_free(machine));
}

static void test_pages(void)
{
	struct luo_machine *machine = small_machine();
	struct luo_kernel *old = small_kernel(machine), *next = small_kernel(machine);
	uint64_t phys, small;
	void *bytes;

	OK(luo_boot(old, NULL));
	OK(luo_alloc_pages(old, 3, &phys));
	OK(luo_preserve_pages(old, phys, 3));
	OK(luo_unpreserve_pages(old, phys, 3));
	EXPECT(luo_unpreserve_pages(old, phys, 3), -ENOENT);
	OK(luo_preserve_pages(old, phys, 3));
	OK(luo_alloc_preserve(old, 100, &small));
	OK(luo_unpreserve_free(old, small));
	EXPECT(luo_alloc_preserve(old, 1ull << 40, &small), -E2BIG);
	OK(luo_machine_bytes(machine, phys, 3 * 4096, &bytes));
	memset(bytes, 0x5a, 3 * 4096);
	EXPECT(luo_claim(old, phys, 0), -EBUSY);
	OK(luo_kexec_load(old, next));
	OK(luo_prepare(old));
	OK(luo_kexec(old));
	EXPECT(luo_preserve_pages(old, phys, 1), -ESHUTDOWN);
	OK(luo_machine_bytes(machine, phys, 3 * 4096, &bytes));
	EXPECT(((uint8_t *)bytes)[3 * 4096 - 1], 0x5a);
	OK(luo_restore_pages(next, phys, 3));
	OK(luo_free_pages(next, phys, 3));
	EXPECT(luo_free_pages(next, phys, 3), -EINVAL);
	OK(luo_kernel_free(old));
	OK(luo_kernel_free(next));
	OK(luo_machine_free(machine));
}

static void *update_elsewhere(void *argument)
{
	EXPECT(strlen(luo_last_error()), 0);	/* another thread's error is not ours */
	EXPECT(luo_init(LUO_ABI), LUO_ABI);
	update(argument);
	return NULL;
}

static void *prepare_and_cancel(void *argument)
{
	struct luo_kernel *kernel = argument;
	int i, rc;

	for (i = 0; i < 20; i++) {
		rc = luo_prepare(kernel);
		EXPECT(rc == 0 || rc == -EINVAL, 1);
		rc = luo_cancel(kernel);
		EXPECT(rc == 0 || rc == -EINVAL, 1);
		EXPECT(state(kernel) >= 0, 1);
	}
	return NULL;
}

static void test_threads(void)
{
	struct luo_machine *machine = small_machine();
	struct luo_kernel *kernel;
	struct luo_step step;
	pthread_t thread[3];
	int i;

	EXPECT(luo_machine_free(NULL), -EINVAL);
	pthread_create(&thread[0], NULL, update_elsewhere, machine);
	pthread_join(thread[0], NULL);
	SAYS("machine is NULL");

	machine = small_machine();
	kernel = kernel_with(machine, &(struct luo_options){ .workers = 2 }, NULL);
	OK(luo_boot(kernel, NULL));
	OK(luo_request(kernel, "*", 1));
	for (i = 0; i < 3; i++)
		pthread_create(&thread[i], NULL, prepare_and_cancel, kernel);
	for (i = 0; i < 3; i++)
		pthread_join(thread[i], NULL);
	if (state(kernel) == LUO_PREPARED)
		OK(luo_cancel(kernel));

	/* others wait until an event that is stepped through has ended */
	OK(luo_begin(kernel, LUO_PREPARE));
	pthread_create(&thread[0], NULL, prepare_and_cancel, kernel);
	OK(luo_next(kernel, &step));
	EXPECT(state(kernel), LUO_NORMAL);
	OK(luo_abort(kernel));
	pthread_join(thread[0], NULL);
	OK(luo_kernel_free(kernel));
	OK(luo_machine_free(machine));
}

static const struct {
	const char *name;
	void (*run)(void);
} tests[] = {
	{ "handles", test_handles }, { "null", test_null }, { "ram", test_ram },
	{ "split_ram", test_split_ram }, { "two_files", test_two_files },
	{ "host_ram", test_host_ram }, { "kernels", test_kernels },
	{ "callback_errno", test_callback_errno }, { "reentry", test_reentry },
	{ "handover", test_handover }, { "image", test_image }, { "unreclaimed", test_unreclaimed },
	{ "steps", test_steps }, { "costs", test_costs },
	{ "kexec_steps", test_kexec_steps }, { "pages", test_pages },
	{ "threads", test_threads }
};

/* "calls" alone names the tests, "calls all" makes them one after the other. */
int main(int argc, char **argv)
{
	size_t i;
	struct luo_machine *machine;

	for (i = 0; argc < 2 && i < sizeof(tests) / sizeof(*tests); i++)
		puts(tests[i].name);
	if (argc < 2)
		return 0;
	EXPECT(luo_machine_new(&machine), -ENXIO);
	SAYS("has not been called");
	EXPECT(luo_init(LUO_ABI + 1), -EPROTONOSUPPORT);
	EXPECT(luo_init(LUO_ABI), LUO_ABI);
	EXPECT(luo_init(LUO_ABI), LUO_ABI);
	for (i = 0; i < sizeof(tests) / sizeof(*tests); i++)
		if (!strcmp(argv[1], "all") || !strcmp(argv[1], tests[i].name))
			tests[i].run();
	return failures != 0;
}
