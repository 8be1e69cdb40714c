/*
 * luo.h: what a native callback of a driver or bus may do with the device it is called for; and,
 * in luo_embed.h, the engine for programs that link to libluo.so.
 *
 * A callback is registered from Python with luo.native(pointer, ctx), or from C in a struct luo_ops.
 * It is called without the GIL, once a device, and returns 0 or -errno; a positive value is -EINVAL.
 * It may be called from several threads at once if the kernel has workers and the callback table
 * says thread_safe. The device and everything reached through it is valid until the callback
 * returns.
 *
 * For callbacks nothing has to be linked: the functions below go through a table that the device
 * begins with.
 */
#ifndef LUO_H
#define LUO_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct luo_device;

typedef int (*luo_callback)(struct luo_device *dev, void *ctx);

/* Events, as luo_device_event() tells them. */
enum luo_event {
	LUO_PREPARE = 0,
	LUO_REBOOT = 1,
	LUO_FINISH = 2,
	LUO_CANCEL = 3,
	LUO_RESTORE = 4
};

/* The table; private. Entries are only ever added at the end. */
struct luo_device_calls {
	size_t nbytes;
	int32_t (*index)(const struct luo_device *dev);
	int (*event)(const struct luo_device *dev);
	void *(*slot)(const struct luo_device *dev, int bus, size_t *nbytes);
	const void *(*column)(const struct luo_device *dev, const char *name, size_t *nbytes);
	int (*reclaim)(const struct luo_device *dev);
};

static inline const struct luo_device_calls *luo_device_calls(const struct luo_device *dev)
{
	return *(const struct luo_device_calls *const *)dev;
}

/* Number of the device in the device tree. */
static inline int32_t luo_device_index(const struct luo_device *dev)
{
	return luo_device_calls(dev)->index(dev);
}

/* The event, an enum luo_event. */
static inline int luo_device_event(const struct luo_device *dev)
{
	return luo_device_calls(dev)->event(dev);
}

/* The driver's state of the device in preserved memory, writable; NULL and 0 bytes if it has none. */
static inline void *luo_device_slot(const struct luo_device *dev, size_t *nbytes)
{
	return luo_device_calls(dev)->slot(dev, 0, nbytes);
}

/* The bus's. */
static inline void *luo_device_bus_slot(const struct luo_device *dev, size_t *nbytes)
{
	return luo_device_calls(dev)->slot(dev, 1, nbytes);
}

/* What the hardware has in a column of the device tree; NULL and 0 bytes if there is none. */
static inline const void *luo_device_column(const struct luo_device *dev, const char *name,
					    size_t *nbytes)
{
	return luo_device_calls(dev)->column(dev, name, nbytes);
}

/* Say that the device runs again, in RESTORE or FINISH; 0, or -EINVAL if it was not preserved. */
static inline int luo_device_reclaim(const struct luo_device *dev)
{
	return luo_device_calls(dev)->reclaim(dev);
}

#include "luo_embed.h"

#ifdef __cplusplus
}
#endif

#endif /* LUO_H */
