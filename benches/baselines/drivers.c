/*
 * Callbacks of a driver with 64 bytes of state, as native code; and a bare clock read.
 */
#include <errno.h>
#include <luo.h>
#include <string.h>
#include <time.h>

enum { STATE = 64, PATCH = 8 };

/* What is saved, then what REBOOT writes over its beginning. */
uint8_t state[STATE];
uint8_t patch[PATCH];

int driver_save(struct luo_device *dev, void *ctx)
{
	size_t nbytes;
	void *slot = luo_device_slot(dev, &nbytes);

	(void)ctx;
	if (nbytes != STATE)
		return -EINVAL;
	memcpy(slot, state, STATE);
	return 0;
}

int driver_patch(struct luo_device *dev, void *ctx)
{
	size_t nbytes;
	void *slot = luo_device_slot(dev, &nbytes);

	(void)ctx;
	if (nbytes != STATE)
		return -EINVAL;
	memcpy(slot, patch, PATCH);
	return 0;
}

/* ctx: how many bytes of the patch are expected. */
int driver_restore(struct luo_device *dev, void *ctx)
{
	size_t nbytes, patched = (size_t)(uintptr_t)ctx;
	const uint8_t *slot = luo_device_slot(dev, &nbytes);

	if (nbytes != STATE || memcmp(slot, patch, patched) ||
	    memcmp(slot + patched, state + patched, STATE - patched))
		return -EIO;
	return luo_device_reclaim(dev);
}

int driver_nothing(struct luo_device *dev, void *ctx)
{
	(void)dev;
	(void)ctx;
	return 0;
}

/* Read the clock n times; returns what went by, so that nothing is optimised away. */
int64_t clock_reads(uint64_t n)
{
	struct timespec now, first;

	clock_gettime(CLOCK_MONOTONIC, &first);
	now = first;
	for (uint64_t i = 0; i < n; i++)
		clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)(now.tv_sec - first.tv_sec) * 1000000000 + (now.tv_nsec - first.tv_nsec);
}
