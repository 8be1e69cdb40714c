# What luo.h has for native callbacks, for drivers that are written in Cython:
#
#     from luo.callbacks cimport luo_device, luo_device_slot
#
# Compile with luo.get_include() among the include directories; nothing has to be linked.

from libc.stdint cimport int32_t

from luo._kho cimport luo_callback, luo_device

cdef extern from "luo.h" nogil:
    enum luo_event:
        LUO_PREPARE
        LUO_REBOOT
        LUO_FINISH
        LUO_CANCEL
        LUO_RESTORE
    int32_t luo_device_index(const luo_device *dev)
    int luo_device_event(const luo_device *dev)
    void *luo_device_slot(const luo_device *dev, size_t *nbytes)
    void *luo_device_bus_slot(const luo_device *dev, size_t *nbytes)
    const void *luo_device_column(const luo_device *dev, const char *name, size_t *nbytes)
    int luo_device_reclaim(const luo_device *dev)
