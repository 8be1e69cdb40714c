/*
 * luo_embed.h: the engine inside a C program that links to libluo.so. Included by luo.h.
 *
 * Every function but luo_init() and luo_last_error() returns 0, or -errno with a text for
 * luo_last_error(). A pointer that is NULL is -EINVAL unless it is said what NULL means; so are
 * sizes and numbers that nothing has. What is given is copied unless it is said that it is kept.
 *
 * Machines and kernels are handles. One that was freed, or never was, is -EBADF; a kernel that has
 * jumped to the next one, or was dropped by a jump that failed, is -ESHUTDOWN until it is freed.
 *
 * Threads: luo_init() first, from one thread or several; then any thread may call anything, and
 * none of them has to know Python. Calls on one kernel wait for each other: an event for the event
 * before it, and a request too. luo_state() waits for no event. From a callback, and from the
 * thread that has begun an event by luo_begin(), another event or request is -EDEADLK. Callbacks
 * run in the thread that called; those of drivers and buses also in threads of the engine, several
 * at once, if `thread_safe` and `workers` say so. Not from a signal handler, not in a child that
 * was forked after luo_init() and has not exec'ed, not once exit() has begun. A callback returns;
 * it neither jumps nor throws past its caller.
 *
 * Time is nanoseconds, sizes are bytes, addresses of simulated memory are physical.
 */

#define LUO_ABI 1

/*
 * Start, or join, the Python that libluo.so was built for. Returns LUO_ABI, and never 0: anything
 * else is -errno, with the reason on standard error as well.
 * -EPROTONOSUPPORT: the header is of another version than the library. -ENOENT: that Python is
 * gone. -ENOEXEC: it does not start, or the one that runs is another.
 */
int luo_init(int abi);

/* What went wrong in the last call of this thread that failed; "" if none has. Never NULL. */
const char *luo_last_error(void);

/* ---- the machine: memory and devices, which outlive every kernel ---- */

struct luo_machine;

int luo_machine_new(struct luo_machine **machine);

/* -EBUSY while there are kernels of it. */
int luo_machine_free(struct luo_machine *machine);

/*
 * Add RAM: nbytes at physical address base, whole pages, on NUMA node `node`, which are the bytes
 * of fd from offset on. The file is mapped shared; fd is duplicated. Before the first kernel.
 *
 * Ranges of one file at the same distance (offset - base) from each other are one mapping, which a
 * successor in another process can have too. Any other files and offsets are mapped side by side:
 * then successors are of this process.
 */
int luo_machine_add_ram(struct luo_machine *machine, uint64_t base, uint64_t nbytes, int fd,
			uint64_t offset, int node);

/*
 * Add RAM that is memory of this process: nbytes at host, which begins on a page, and stays until
 * the machine is freed. All ranges must be at the same distance (host - base), and none by fd may
 * be beside them. Successors are of this process.
 */
int luo_machine_add_host_ram(struct luo_machine *machine, uint64_t base, uint64_t nbytes,
			     void *host, int node);

/*
 * Where the engine has nbytes of RAM at phys, writable: the same bytes as the owner's own mapping.
 * For RAM by fd this ends with the next jump.
 */
int luo_machine_bytes(struct luo_machine *machine, uint64_t phys, uint64_t nbytes, void **bytes);

/* Bytes that the hardware has beside each device, which callbacks see by name. */
struct luo_column {
	const char *name;
	const void *data;		/* all rows */
	const uint64_t *offsets;	/* where each begins and ends, count + 1; NULL: see width */
	uint64_t width;			/* of each row */
};

/* Devices in bulk. A pointer that is NULL: no device has such a thing. */
struct luo_devices {
	int32_t count;
	const char *const *names;	/* as in /sys/devices; required */
	const int32_t *parents;		/* number of a device before it, -1 for a root */
	const char *const *buses;	/* NULL for none */
	const char *const *drivers;	/* NULL for none */
	const int32_t *nodes;		/* NUMA node */
	const struct luo_column *columns;
	int32_t nr_columns;
};

/* Add them all or none. first: number of the first one; NULL: not wanted. */
int luo_machine_add_devices(struct luo_machine *machine, const struct luo_devices *devices,
			    int32_t *first);

/* Number of the device at a path ("pci0000:00/0000:00:1f.2"). -ENOENT */
int luo_machine_find(struct luo_machine *machine, const char *path, int32_t *device);

/* Path of a device, into room bytes with its NUL. -ENOENT, -ENAMETOOLONG */
int luo_machine_path(struct luo_machine *machine, int32_t device, char *path, uint64_t room);

/* ---- a kernel: drivers, buses and subsystems ---- */

struct luo_kernel;

/* Simulated time. Called by whichever thread runs an event; must not go back. */
typedef int64_t (*luo_clock)(void *ctx);

/* All zero is the default. */
struct luo_options {
	const char *kho_abi;		/* generation of the handover; NULL: "kho-v4" */
	const char *release;		/* of uname -r */
	const char *cmdline;		/* NULL: "kho=on liveupdate=on" */
	const char *behaviour;		/* "intended" or "rfc1"; NULL: "intended" */
	int workers;			/* threads for callbacks that are thread_safe; 0: 1 */
	int64_t callback_limit_ns;	/* 0: none */
	luo_clock clock;		/* NULL: CLOCK_MONOTONIC */
	void *clock_ctx;
};

/* options: NULL for the default */
int luo_kernel_new(struct luo_machine *machine, const struct luo_options *options,
		   struct luo_kernel **kernel);

/* As by a power cut if it runs; what it handed over stays in memory. */
int luo_kernel_free(struct luo_kernel *kernel);

/* Callbacks of a driver or bus, NULL where there is none. Called without Python's lock. */
struct luo_ops {
	luo_callback prepare;
	luo_callback reboot;
	luo_callback finish;
	luo_callback cancel;
	luo_callback restore;
	void *ctx;			/* second argument of each */
	uint64_t state_size;		/* bytes of every device's slot */
	const char *state_column;	/* not NULL: slots are as large as this column's rows */
	int thread_safe;
};

/* Before it boots or is loaded. ops NULL: it does not support live update. */
int luo_kernel_add_driver(struct luo_kernel *kernel, const char *name, const struct luo_ops *ops);
int luo_kernel_add_bus(struct luo_kernel *kernel, const char *name, const struct luo_ops *ops);

/* What a subsystem's callback is given. */
struct luo_context {
	struct luo_kernel *kernel;
	uint64_t data;			/* carried over: set in PREPARE or REBOOT, read in RESTORE */
	int event;			/* an enum luo_event */
};

typedef int (*luo_subsystem_callback)(struct luo_context *context, void *ctx);

enum luo_priority {
	LUO_BEFORE_DEVICES = 0,
	LUO_WITH_DEVICES = 1,
	LUO_AFTER_DEVICES = 2
};

struct luo_subsystem {
	const char *name;
	int priority;			/* an enum luo_priority */
	luo_subsystem_callback prepare;
	luo_subsystem_callback reboot;
	luo_subsystem_callback finish;
	luo_subsystem_callback cancel;
	luo_subsystem_callback restore;
	void *ctx;
};

/* Before it boots or is loaded. */
int luo_kernel_add_subsystem(struct luo_kernel *kernel, const struct luo_subsystem *subsystem);

/* ---- what a kernel is told by the one before it ---- */

struct luo_handover {
	uint64_t fdt_phys;
	uint64_t fdt_len;
	uint64_t scratch_phys;
	uint64_t scratch_len;
};

/* After luo_reboot(), or once REBOOT has been stepped through. */
int luo_get_handover(struct luo_kernel *kernel, struct luo_handover *handover);

/* As the x86 setup_data node of 48 bytes; next_phys: of the node after it, or 0. */
int luo_handover_to_setup_data(const struct luo_handover *handover, uint64_t next_phys,
			       void *node);
/* -EBADMSG: it is none of KHO's. */
int luo_handover_from_setup_data(const void *node, uint64_t nbytes,
				 struct luo_handover *handover);

/* Boot. handover: of the kernel before it, which is freed by now; NULL: a cold boot. */
int luo_boot(struct luo_kernel *kernel, const struct luo_handover *handover);

/* ---- live update ---- */

enum luo_state {
	LUO_NORMAL = 0,
	LUO_PREPARED = 1,
	LUO_UPDATED = 2
};

int luo_state(struct luo_kernel *kernel, int *state);

/* Have devices kept, or not: all that a glob over paths matches and that support live update. */
int luo_request(struct luo_kernel *kernel, const char *glob, int on);
/* By number. -EINVAL if one does not support live update; then nothing is changed. */
int luo_request_devices(struct luo_kernel *kernel, const int32_t *devices, int32_t count, int on);

enum luo_flag {
	LUO_REQUESTED = 0,
	LUO_PRESERVED = 1,
	LUO_RECLAIMED = 2
};

/* Copy one flag, 0 or 1, of the first count devices. */
int luo_flags(struct luo_kernel *kernel, int flag, uint8_t *flags, int32_t count);

/* Events. One whose callback fails has rolled everything back, and returns what that returned. */
int luo_prepare(struct luo_kernel *kernel);
int luo_cancel(struct luo_kernel *kernel);
/* REBOOT alone, for who jumps by luo_kernel_free() and luo_boot(). -EINVAL unless PREPARED. */
int luo_reboot(struct luo_kernel *kernel);
/* unreclaimed: how many devices were kept and do not run again; NULL: not wanted. */
int luo_finish(struct luo_kernel *kernel, int32_t *unreclaimed);

/* Load the next kernel, of the same machine and not booted; NULL drops the one that is loaded. */
int luo_kexec_load(struct luo_kernel *kernel, struct luo_kernel *next);
/*
 * Load a kernel image in a process of its own: "package.module:factory", a function in Python that
 * is importable there and makes a kernel of a machine, as "luo.drivers:kernel" does. RAM must be
 * one mapping by fd. Once it runs, next answers for its state, events, requests, flags and costs;
 * what else one can ask a kernel is -EOPNOTSUPP, and so is everything before it runs.
 */
int luo_kexec_load_image(struct luo_kernel *kernel, const char *image, struct luo_kernel **next);
/*
 * REBOOT, unless it has been stepped through; jump; boot and restore what is loaded. The kernel is
 * gone then, and `next` runs. A failure before the commit point cancels the update: the state is
 * NORMAL, and `next` is gone.
 */
int luo_kexec(struct luo_kernel *kernel);

/* ---- the same one callback at a time, for hosts that own time ---- */

enum luo_step_kind {
	LUO_STEP_END = 0,		/* there are no more: the event is complete */
	LUO_STEP_SUBSYSTEM = 1,
	LUO_STEP_DRIVER = 2,
	LUO_STEP_BUS = 3
};

struct luo_step {
	struct luo_kernel *kernel;
	uint64_t number;		/* of the step in its event, from 1 on */
	int kind;			/* an enum luo_step_kind */
	const char *name;		/* of the subsystem, driver or bus; stays for ever */
	int32_t device;			/* -1 for a subsystem */
	int32_t devices;		/* how many it serves */
};

/* For luo_begin(), in place of an event: REBOOT, the jump, boot, and RESTORE of the next kernel. */
#define LUO_KEXEC 5

/*
 * Begin PREPARE, REBOOT, FINISH, CANCEL or LUO_KEXEC. The state is held until the event has ended.
 * LUO_KEXEC is stepped through by the kernel that began it, to the end, although that is gone after
 * the last step of REBOOT; the next kernel must be of this process.
 */
int luo_begin(struct luo_kernel *kernel, int event);
/* The next callback, which has not run. -EBUSY: the one before it has not, either. */
int luo_next(struct luo_kernel *kernel, struct luo_step *step);
/*
 * Run it, and account ns of simulated time to it; below 0 the time is measured. A failure has
 * rolled everything back, and the event has ended. -EALREADY: it has run, or its event has ended.
 */
int luo_complete(const struct luo_step *step, int64_t ns);
/*
 * End it early: PREPARE and REBOOT are rolled back, FINISH and CANCEL completed; LUO_KEXEC is rolled
 * back before the jump, and completed after it.
 */
int luo_abort(struct luo_kernel *kernel);

/* ---- memory of the simulated kernel ---- */

/* Allocate adjoining pages; mark a block of 2^order pages as in use, where nobody has it yet. */
int luo_alloc_pages(struct luo_kernel *kernel, uint64_t nr_pages, uint64_t *phys);
int luo_free_pages(struct luo_kernel *kernel, uint64_t phys, uint64_t nr_pages);
int luo_claim(struct luo_kernel *kernel, uint64_t phys, int order);

/* Keep pages across the jump; and in the next kernel, take them over again. */
int luo_preserve_pages(struct luo_kernel *kernel, uint64_t phys, uint64_t nr_pages);
int luo_unpreserve_pages(struct luo_kernel *kernel, uint64_t phys, uint64_t nr_pages);
int luo_restore_pages(struct luo_kernel *kernel, uint64_t phys, uint64_t nr_pages);

/* Zeroed memory that is kept, at most one block of the largest order; and its two ends. */
int luo_alloc_preserve(struct luo_kernel *kernel, uint64_t nbytes, uint64_t *phys);
int luo_unpreserve_free(struct luo_kernel *kernel, uint64_t phys);
int luo_restore_free(struct luo_kernel *kernel, uint64_t phys);

/* ---- what it cost ---- */

/* All calls of one callback. The strings stay for ever. */
struct luo_cost {
	const char *subsystem;
	const char *event;
	const char *kind;
	const char *name;
	uint64_t calls;
	uint64_t devices;
	int64_t total_ns;
	int64_t min_ns;
	int64_t p50_ns;
	int64_t p99_ns;
	int64_t max_ns;
};

/* Copy at most room rows. count: how many there are. Works on a kernel that is gone, too. */
int luo_profile(struct luo_kernel *kernel, struct luo_cost *rows, int32_t room, int32_t *count);

struct luo_phase {
	const char *name;		/* "prepare" … "restore", "finish"; "blackout" */
	int64_t ns;
};

/* The phases that the kernel has passed, and of the jump that made it run. As luo_profile(). */
int luo_phases(struct luo_kernel *kernel, struct luo_phase *rows, int32_t room, int32_t *count);
