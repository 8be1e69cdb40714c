"""What a call from Python costs at the least: a Cython method that does nothing."""


cdef class Empty:
    def preserve_folio(self, phys, order):
        pass
