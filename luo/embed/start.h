/*
 * What libluo.so has in C: the start of Python, the text of errors, and what reads arrays.
 *
 * luo.embed.build puts it behind cffi's own start-up code, with LUO_PYTHON (path of the
 * interpreter) and the functions of luo_embed.h that pass their arguments on to Python.
 */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "luo.h"

#define LUO_PUBLIC __attribute__((visibility("default")))
#define LUO_TEXT_BYTES 1024

static _Thread_local char luo_text[LUO_TEXT_BYTES];
static volatile int luo_started;

LUO_PUBLIC const char *luo_last_error(void)
{
	return luo_text;
}

static char *luo_text_buffer(void)
{
	return luo_text;
}

/* ---- start ---- */

/* Kept apart from the code: whoever looks for the path in the file finds all of it. */
static const char luo_python[] = LUO_PYTHON;

__attribute__((format(printf, 2, 3)))
static int luo_refuse(int code, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(luo_text, sizeof(luo_text), format, arguments);
	va_end(arguments);
	fprintf(stderr, "luo_init: %s\n", luo_text);
	return -code;
}

static int luo_not_started(void)
{
	snprintf(luo_text, sizeof(luo_text), "luo_init() has not been called, or has failed");
	return -ENXIO;
}

/* Extension modules have no libpython of their own: they look for its symbols in the open. */
static void luo_promote_python(void)
{
	Dl_info python;

	if (dladdr((void *)Py_IsInitialized, &python) && python.dli_fname)
		dlopen(python.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
}

static int luo_start_python(void)
{
	PyPreConfig early;
	PyConfig config;
	PyStatus status;

	if (access(luo_python, X_OK) < 0)
		return luo_refuse(ENOENT, "%s: the Python that libluo.so was built for: %s",
				  luo_python, strerror(errno));
	/* The locale and the signal handlers are the program's; how Python allocates is up to the
	 * environment, where it finds its modules is not. */
	PyPreConfig_InitPythonConfig(&early);
	early.configure_locale = 0;
	early.coerce_c_locale = 0;
	early.utf8_mode = 1;
	early.parse_argv = 0;
	status = Py_PreInitialize(&early);
	if (PyStatus_Exception(status))
		return luo_refuse(ENOEXEC, "%s does not start: %s", luo_python,
				  status.err_msg ? status.err_msg : "?");
	PyConfig_InitPythonConfig(&config);
	config.use_environment = 0;
	config.install_signal_handlers = 0;
	config.parse_argv = 0;
	status = PyConfig_SetBytesString(&config, &config.executable, luo_python);
	if (!PyStatus_Exception(status))
		status = PyConfig_SetBytesString(&config, &config.program_name, luo_python);
	if (!PyStatus_Exception(status))
		status = Py_InitializeFromConfig(&config);
	PyConfig_Clear(&config);
	if (PyStatus_Exception(status))
		return luo_refuse(ENOEXEC, "%s does not start: %s", luo_python,
				  status.err_msg ? status.err_msg : "?");
	PyEval_SaveThread();
	return 0;
}

LUO_PUBLIC int luo_init(int abi)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	static int rc;
	size_t length = strlen(PY_VERSION) - strlen(strrchr(PY_VERSION, '.'));

	if (abi != LUO_ABI)
		return luo_refuse(EPROTONOSUPPORT, "luo.h has ABI %d, the library %d", abi, LUO_ABI);
	if (luo_started)	/* whoever has the GIL must not wait for the lock */
		return LUO_ABI;
	if (Py_IsInitialized() && PyGILState_Check()) {
		/* Called from Python with the GIL: one at a time anyway. */
	} else {
		pthread_mutex_lock(&lock);
		if (!luo_started && !Py_IsInitialized() && rc == 0)
			rc = luo_start_python();
		pthread_mutex_unlock(&lock);
	}
	if (rc < 0)
		return rc;
	if (strncmp(Py_GetVersion(), PY_VERSION, length + 1))
		return luo_refuse(ENOEXEC, "Python %.*s runs here, libluo.so was built for %s",
				  (int)strcspn(Py_GetVersion(), " "), Py_GetVersion(), PY_VERSION);
	luo_promote_python();
	if (cffi_start_python() < 0)
		return luo_refuse(ENOEXEC, "%s: luo cannot be imported", luo_python);
	luo_started = 1;
	return LUO_ABI;
}

/* ---- what reads arrays, and maps ---- */

/* Bytes of all strings, each without its NUL, and where they end in offsets[1..count]. */
static int64_t luo_measure(const char *const *strings, int32_t count, uint64_t *offsets)
{
	int32_t i;

	offsets[0] = 0;
	for (i = 0; i < count; i++) {
		if (!strings[i])
			return -EINVAL;
		offsets[i + 1] = offsets[i] + strlen(strings[i]);
	}
	return (int64_t)offsets[count];
}

static void luo_join(const char *const *strings, int32_t count, const uint64_t *offsets, char *data)
{
	int32_t i;

	for (i = 0; i < count; i++)
		memcpy(data + offsets[i], strings[i], offsets[i + 1] - offsets[i]);
}

/* Address space for ranges that are mapped side by side; NULL if there is none. */
static void *luo_reserve(uint64_t nbytes)
{
	void *place = mmap(NULL, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
			   0);

	return place == MAP_FAILED ? NULL : place;
}

static int luo_map(void *place, uint64_t nbytes, int fd, uint64_t offset)
{
	void *there = mmap(place, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
			   (off_t)offset);

	return there == MAP_FAILED ? -errno : 0;
}

static void luo_unmap(void *place, uint64_t nbytes)
{
	munmap(place, nbytes);
}
