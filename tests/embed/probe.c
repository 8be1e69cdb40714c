/* Starts the engine as a plugin does, with libluo.so loaded where nobody else sees its symbols:
 * "probe LIBRARY [threads]" prints what luo_init() returns, and what a call does afterwards. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "luo.h"

static int (*init)(int);
static int found[8];

static void *start(void *number)
{
	found[*(int *)number] = init(LUO_ABI);
	return NULL;
}

int main(int argc, char **argv)
{
	void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
	int (*machine_new)(struct luo_machine **);
	const char *(*last_error)(void);
	struct luo_machine *machine = NULL;
	pthread_t threads[8];
	int i, rc, numbers[8];

	if (!library) {
		puts(dlerror());
		return 1;
	}
	*(void **)&init = dlsym(library, "luo_init");
	*(void **)&machine_new = dlsym(library, "luo_machine_new");
	*(void **)&last_error = dlsym(library, "luo_last_error");
	for (i = 0; argc > 2 && i < 8; i++) {
		numbers[i] = i;
		pthread_create(&threads[i], NULL, start, &numbers[i]);
	}
	for (i = 0; argc > 2 && i < 8; i++) {
		pthread_join(threads[i], NULL);
		if (found[i] != LUO_ABI)
			printf("thread %d: %d\n", i, found[i]);
	}
	printf("luo_init %d\n", init(LUO_ABI));
	rc = machine_new(&machine);
	printf("luo_machine_new %d %s\n", rc, rc < 0 ? last_error() : "");
	return 0;
}
