/* What gcc's -fsanitize-coverage=trace-pc,trace-cmp calls: which edges of the core a run took, and
 * which unequal numbers it compared. Part of a LUO_SANITIZE=1 build; fuzz/engine.py reads the two
 * arrays through ctypes. (libFuzzer, and with it atheris, reads only what clang instruments.)
 */
#include <stdint.h>

#define HIDDEN __attribute__((no_sanitize_coverage, no_sanitize("address", "undefined")))

enum { EDGES = 1 << 16, PAIRS = 1 << 10 };

uint8_t luo_fuzz_edges[EDGES]; /* how often each was taken, saturating */
uint64_t luo_fuzz_pairs[PAIRS][2]; /* ring of compared numbers */
uint64_t luo_fuzz_nr_pairs;

static __thread uint32_t before;

HIDDEN void __sanitizer_cov_trace_pc(void)
{
	uint64_t at = (uint64_t)__builtin_return_address(0) * 0x9E3779B97F4A7C15ull;
	uint32_t here = at >> 40 & (EDGES - 1);
	uint8_t *edge = &luo_fuzz_edges[here ^ before];

	before = here >> 1;
	*edge += *edge != 255;
}

HIDDEN static void compared(uint64_t a, uint64_t b)
{
	if (a != b) {
		uint64_t at = luo_fuzz_nr_pairs++ % PAIRS;

		luo_fuzz_pairs[at][0] = a;
		luo_fuzz_pairs[at][1] = b;
	}
}

HIDDEN void __sanitizer_cov_trace_cmp1(uint8_t a, uint8_t b) { (void)a, (void)b; }
HIDDEN void __sanitizer_cov_trace_cmp2(uint16_t a, uint16_t b) { compared(a, b); }
HIDDEN void __sanitizer_cov_trace_cmp4(uint32_t a, uint32_t b) { compared(a, b); }
HIDDEN void __sanitizer_cov_trace_cmp8(uint64_t a, uint64_t b) { compared(a, b); }
HIDDEN void __sanitizer_cov_trace_const_cmp1(uint8_t a, uint8_t b) { (void)a, (void)b; }
HIDDEN void __sanitizer_cov_trace_const_cmp2(uint16_t a, uint16_t b) { compared(a, b); }
HIDDEN void __sanitizer_cov_trace_const_cmp4(uint32_t a, uint32_t b) { compared(a, b); }
HIDDEN void __sanitizer_cov_trace_const_cmp8(uint64_t a, uint64_t b) { compared(a, b); }
HIDDEN void __sanitizer_cov_trace_cmpf(float a, float b) { (void)a, (void)b; }
HIDDEN void __sanitizer_cov_trace_cmpd(double a, double b) { (void)a, (void)b; }
HIDDEN void __sanitizer_cov_trace_switch(uint64_t value, uint64_t *cases)
{
	for (uint64_t i = 0; i < cases[0]; i++)
		compared(value, cases[2 + i]);
}
