/* Native callbacks of the tests: a driver that saves a column, and callbacks that go wrong. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "luo.h"

struct context {
	int64_t calls[5];	/* by event */
	int32_t fail_at;	/* device, -1 none */
	int32_t rc;
	int64_t usec;
};

static int count(struct luo_device *dev, struct context *context)
{
	__atomic_fetch_add(&context->calls[luo_device_event(dev)], 1, __ATOMIC_RELAXED);
	if (context->usec)
		usleep(context->usec);
	return luo_device_index(dev) == context->fail_at ? context->rc : 0;
}

int save(struct luo_device *dev, void *ctx)
{
	size_t room, nbytes;
	unsigned char *slot = luo_device_slot(dev, &room);
	const void *state = luo_device_column(dev, "state", &nbytes);

	if (slot && state)
		memcpy(slot, state, nbytes < room ? nbytes : room);
	return count(dev, ctx);
}

int touch(struct luo_device *dev, void *ctx)
{
	size_t room;
	unsigned char *slot = luo_device_slot(dev, &room);

	if (room)
		slot[0] ^= 0xff;
	return count(dev, ctx);
}

int tally(struct luo_device *dev, void *ctx)
{
	return count(dev, ctx);
}

int restore(struct luo_device *dev, void *ctx)
{
	size_t room, nbytes;
	const unsigned char *slot = luo_device_slot(dev, &room);
	const unsigned char *state = luo_device_column(dev, "state", &nbytes);
	int rc = count(dev, ctx);

	if (rc)
		return rc;
	if (nbytes < room)
		room = nbytes;
	if (room && ((slot[0] ^ state[0]) != 0xff || memcmp(slot + 1, state + 1, room - 1)))
		return -EIO;
	return luo_device_reclaim(dev);
}

int odd_questions(struct luo_device *dev, void *ctx)
{
	size_t nbytes = 7;

	(void)ctx;
	if (luo_device_column(dev, "no such column", &nbytes) || nbytes)
		return -1;
	nbytes = 7;
	if (luo_device_bus_slot(dev, &nbytes) || nbytes)
		return -2;
	if (luo_device_slot(dev, NULL) == NULL)
		return -3;
	return luo_device_event(dev) == LUO_PREPARE && luo_device_reclaim(dev) != -EINVAL ? -4 : 0;
}
