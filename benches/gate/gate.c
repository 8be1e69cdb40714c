/* What the gate calls from Python: requests to callgrind, which are nothing without it, and native
 * callbacks of a driver that saves 64 bytes, changes 8 of them, and compares all.
 */
#include <errno.h>
#include <string.h>
#include <valgrind/callgrind.h>

#include "luo.h"

void start(void)
{
	CALLGRIND_START_INSTRUMENTATION;
	CALLGRIND_ZERO_STATS;
}

/* Write what was counted since the last time, or since start(). */
void dump(const char *path)
{
	CALLGRIND_DUMP_STATS_AT(path);
}

void stop(void)
{
	CALLGRIND_STOP_INSTRUMENTATION;
}

static unsigned char fill(const struct luo_device *dev)
{
	return (unsigned char)luo_device_index(dev);
}

int save(struct luo_device *dev, void *ctx)
{
	size_t nbytes;
	void *slot = luo_device_slot(dev, &nbytes);

	(void)ctx;
	memset(slot, fill(dev), nbytes);
	return 0;
}

int patch(struct luo_device *dev, void *ctx)
{
	size_t nbytes;
	void *slot = luo_device_slot(dev, &nbytes);

	(void)ctx;
	memset(slot, ~fill(dev), 8);
	return 0;
}

int restore(struct luo_device *dev, void *ctx)
{
	size_t nbytes;
	const unsigned char *slot = luo_device_slot(dev, &nbytes);

	(void)ctx;
	if (slot[0] != (unsigned char)~fill(dev) || slot[8] != fill(dev))
		return -EIO;
	return luo_device_reclaim(dev);
}

int farewell(struct luo_device *dev, void *ctx)
{
	(void)dev;
	(void)ctx;
	return 0;
}
