// PID 1 of the guest: does what a script says with the kernel's live update calls, then powers off.
//
// The script is the file that the kernel's parameter luo_script= names, /script without one. A line
// is a command; words are separated by blanks, "%20" stands for a byte. Results go to the kernel's
// log, whose lines nothing tears apart, and so to the serial console, one line each:
//
//   @ LINE COMMAND ok KEY=VALUE ...
//   @ LINE COMMAND error=ENOENT
//
// Commands:
//
//   open                                  /dev/liveupdate; the first that opens stays open
//   close-device
//   create NAME   retrieve-session NAME   name SESSION   finish SESSION   close SESSION
//   file SESSION TOKEN SIZE [pos=N] [seals=0xN] [order=N] [flags=0xN] [fill=pattern|zero|none]
//        [at=PAGE,PAGE...] [from=PATH]    makes a memfd and preserves it
//   write SESSION TOKEN OFFSET HEX        changes a file of "file" in place
//   preserve SESSION TOKEN PATH           preserves what is not a memfd
//   again SESSION TOKEN OF-SESSION OF-TOKEN          preserves a file that is open already
//   retrieve SESSION TOKEN [crc]          size, position, seals, blocks, crc32, sha256 unless "crc"
//   bytes SESSION TOKEN OFFSET LENGTH     as hex, 256 at most; retrieved if it is not open
//   kexec-load IMAGE [initrd=self|none|PATH] [PARAMETERS...]     initrd=self: this one's files
//   kexec                                 reboot(KEXEC): comes back only with an error
//   cat PATH   hex PATH   ls PATH   set PATH TEXT   echo TEXT...   sleep MS   poweroff   halt
//
// A token is hexadecimal with 0x, or decimal. The pattern of a file: its 8-byte little-endian word
// i is ((token << 32) | (i & 0xffffffff)) mod 2^64.

#define _GNU_SOURCE
#include <arm_acle.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <linux/reboot.h>

#define PAGE 4096UL
#define MAX_OPEN 4096
#define MAX_WORDS 64
#define MAX_LINE 8192
#define BUFFER (1UL << 20)

// /dev/liveupdate (spec: luo-mainline 4.2)
#define NAME_BYTES 64
#define CREATE_SESSION _IO(0xba, 0x00)
#define RETRIEVE_SESSION _IO(0xba, 0x01)
#define PRESERVE_FD _IO(0xba, 0x40)
#define RETRIEVE_FD _IO(0xba, 0x41)
#define FINISH _IO(0xba, 0x42)
#define GET_NAME _IO(0xba, 0x43)

struct by_name {
	uint32_t size;
	int32_t fd;
	char name[NAME_BYTES];
};

struct by_token {
	uint32_t size;
	int32_t fd;
	uint64_t token;
};

struct only_size {
	uint32_t size;
	uint32_t reserved;
};

// What is open: sessions have no token.
struct open_file {
	char session[NAME_BYTES + 1];
	int is_session;
	uint64_t token;
	int fd;
};

static struct open_file opened[MAX_OPEN];
static int nr_opened;
static int device = -1;
static int kmsg = -1;
static int line_number;
static const char *command;
static char *words[MAX_WORDS];
static int nr_words;
static unsigned char buffer[BUFFER] __attribute__((aligned(16)));

// ---- results ----

static void say(const char *format, ...)
{
	char text[960];
	va_list args;
	int n;

	n = snprintf(text, sizeof(text), "<5>@ %d %s ", line_number, command);
	va_start(args, format);
	vsnprintf(text + n, sizeof(text) - n, format, args);
	va_end(args);
	for (n = 0; text[n]; n++)
		if ((unsigned char)text[n] < ' ' || text[n] == 0x7f)
			text[n] = '?';
	if (write(kmsg, text, n) < 0)
		dprintf(1, "%s\n", text + 3);
}

static void failed_as(const char *what, int error)
{
	const char *name = strerrorname_np(error);

	if (name)
		say("error=%s%s%s", name, what ? " at=" : "", what ? what : "");
	else
		say("error=%d%s%s", error, what ? " at=" : "", what ? what : "");
}

static void failed(const char *what)
{
	failed_as(what, errno);
}

// ---- checksums ----

static uint32_t crc32_add(uint32_t crc, const unsigned char *data, size_t n)
{
	crc = ~crc;
	for (; n >= 8; n -= 8, data += 8) {
		uint64_t word;

		memcpy(&word, data, 8);
		crc = __crc32d(crc, word);
	}
	while (n--)
		crc = __crc32b(crc, *data++);
	return ~crc;
}

struct sha256 {
	uint32_t h[8];
	uint64_t bytes;
	unsigned char block[64];
};

static uint32_t sha_k[64];

// The constants are the first 32 bits of the fractions of roots of the first primes: square roots
// for the state, cube roots for the rounds. Found by bisection in whole numbers.
static uint32_t root_fraction(unsigned __int128 prime, int cube)
{
	unsigned __int128 low = 0, high = (unsigned __int128)1 << 40;
	unsigned __int128 goal = cube ? prime << 96 : prime << 64;

	while (high - low > 1) {
		unsigned __int128 mid = (low + high) / 2;
		unsigned __int128 power = cube ? mid * mid * mid : mid * mid;

		if (power <= goal)
			low = mid;
		else
			high = mid;
	}
	return (uint32_t)low;
}

static void sha_start(struct sha256 *s)
{
	int n = 0;

	s->bytes = 0;
	for (unsigned p = 2; n < 64; p++) {
		int prime = 1;

		for (unsigned d = 2; d * d <= p; d++)
			prime &= p % d != 0;
		if (!prime)
			continue;
		if (n < 8)
			s->h[n] = root_fraction(p, 0);
		if (!sha_k[63])
			sha_k[n] = root_fraction(p, 1);
		n++;
	}
}

static inline uint32_t ror(uint32_t x, int n)
{
	return x >> n | x << (32 - n);
}

static void sha_block(struct sha256 *s, const unsigned char *data)
{
	uint32_t w[64], v[8];

	for (int i = 0; i < 16; i++) {
		memcpy(&w[i], data + 4 * i, 4);
		w[i] = __builtin_bswap32(w[i]);
	}
	for (int i = 16; i < 64; i++) {
		uint32_t a = w[i - 15], b = w[i - 2];

		w[i] = w[i - 16] + w[i - 7] + (ror(a, 7) ^ ror(a, 18) ^ a >> 3) +
		       (ror(b, 17) ^ ror(b, 19) ^ b >> 10);
	}
	memcpy(v, s->h, sizeof(v));
	for (int i = 0; i < 64; i++) {
		uint32_t e = v[4], a = v[0];
		uint32_t t1 = v[7] + (ror(e, 6) ^ ror(e, 11) ^ ror(e, 25)) + ((e & v[5]) ^ (~e & v[6])) +
			      sha_k[i] + w[i];
		uint32_t t2 = (ror(a, 2) ^ ror(a, 13) ^ ror(a, 22)) +
			      ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));

		for (int j = 7; j; j--)
			v[j] = v[j - 1];
		v[4] += t1;
		v[0] = t1 + t2;
	}
	for (int i = 0; i < 8; i++)
		s->h[i] += v[i];
}

static void sha_add(struct sha256 *s, const unsigned char *data, size_t n)
{
	size_t held = s->bytes % 64;

	s->bytes += n;
	while (n) {
		size_t part = 64 - held < n ? 64 - held : n;

		if (!held && n >= 64) {
			sha_block(s, data);
			part = 64;
		} else {
			memcpy(s->block + held, data, part);
			held += part;
			if (held == 64) {
				sha_block(s, s->block);
				held = 0;
			}
		}
		data += part;
		n -= part;
	}
}

static void sha_text(struct sha256 *s, char *text)
{
	uint64_t bits = __builtin_bswap64(s->bytes * 8);
	static const unsigned char zero[64];

	sha_add(s, (const unsigned char *)"\x80", 1);
	sha_add(s, zero, (120 - s->bytes % 64) % 64);
	sha_add(s, (const unsigned char *)&bits, 8);
	for (int i = 0; i < 8; i++)
		sprintf(text + 8 * i, "%08x", s->h[i]);
}

// ---- words ----

static void split(char *line)
{
	char *save, *word;

	nr_words = 0;
	for (word = strtok_r(line, " \t\r\n", &save); word && nr_words < MAX_WORDS;
	     word = strtok_r(NULL, " \t\r\n", &save)) {
		char *to = word;

		for (char *from = word; *from; to++) {
			unsigned byte;

			if (*from == '%' && sscanf(from + 1, "%2x", &byte) == 1) {
				*to = (char)byte;
				from += 3;
			} else {
				*to = *from++;
			}
		}
		*to = 0;
		words[nr_words++] = word;
	}
}

static const char *word(int n)
{
	return n < nr_words ? words[n] : "";
}

static uint64_t number(int n)
{
	return strtoull(word(n), NULL, 0);
}

static const char *option(const char *name)
{
	size_t n = strlen(name);

	for (int i = 1; i < nr_words; i++)
		if (!strncmp(words[i], name, n) && words[i][n] == '=')
			return words[i] + n + 1;
	return NULL;
}

static uint64_t option_number(const char *name, uint64_t otherwise)
{
	const char *value = option(name);

	return value ? strtoull(value, NULL, 0) : otherwise;
}

// ---- what is open ----

static void keep(const char *session, int is_session, uint64_t token, int fd)
{
	struct open_file *o = &opened[nr_opened];

	if (nr_opened == MAX_OPEN)
		return;
	snprintf(o->session, sizeof(o->session), "%s", session);
	o->is_session = is_session;
	o->token = token;
	o->fd = fd;
	nr_opened++;
}

// The latest of that name that is still open; -1 without one.
static int find(const char *session, int is_session, uint64_t token)
{
	for (int i = nr_opened - 1; i >= 0; i--)
		if (opened[i].fd >= 0 && opened[i].is_session == is_session && opened[i].token == token &&
		    !strcmp(opened[i].session, session))
			return i;
	return -1;
}

static int session_fd(int n)
{
	int i = find(word(n), 1, 0);

	if (i < 0)
		failed_as("session", EBADF);
	return i < 0 ? -1 : opened[i].fd;
}

// ---- sessions ----

static void do_open(void)
{
	int fd = open("/dev/liveupdate", O_RDWR | O_CLOEXEC);

	if (fd < 0) {
		failed(NULL);
		return;
	}
	if (device < 0)
		device = fd;
	else
		close(fd);
	say("ok");
}

static void do_session(unsigned long call)
{
	struct by_name args = { .size = sizeof(args) };
	size_t n = strlen(word(1));

	memcpy(args.name, word(1), n < NAME_BYTES ? n : NAME_BYTES);
	if (ioctl(device, call, &args)) {
		failed(NULL);
		return;
	}
	keep(word(1), 1, 0, args.fd);
	say("ok");
}

static void do_name(void)
{
	struct by_name args = { .size = sizeof(args) };
	int fd = session_fd(1);

	if (fd < 0)
		return;
	if (ioctl(fd, GET_NAME, &args))
		failed(NULL);
	else
		say("ok name=%.64s", args.name);
}

static void do_finish(void)
{
	struct only_size args = { .size = sizeof(args) };
	int fd = session_fd(1);

	if (fd < 0)
		return;
	if (ioctl(fd, FINISH, &args))
		failed(NULL);
	else
		say("ok");
}

static void do_close(void)
{
	int i = find(word(1), 1, 0);

	if (i < 0) {
		failed_as("session", EBADF);
		return;
	}
	close(opened[i].fd);
	opened[i].fd = -1;
	for (int k = 0; k < nr_opened; k++)
		if (!opened[k].is_session && opened[k].fd >= 0 && !strcmp(opened[k].session, word(1))) {
			close(opened[k].fd);
			opened[k].fd = -1;
		}
	say("ok");
}

// ---- files ----

static void fill_pattern(uint64_t token, uint64_t at, size_t n)
{
	uint64_t *w = (uint64_t *)buffer;

	for (size_t i = 0; i < (n + 7) / 8; i++)
		w[i] = token << 32 | ((at / 8 + i) & 0xffffffff);
}

static int write_all(int fd, uint64_t at, size_t n)
{
	for (size_t done = 0; done < n;) {
		ssize_t part = pwrite(fd, buffer + done, n - done, at + done);

		if (part <= 0)
			return -1;
		done += part;
	}
	return 0;
}

static int fill(int fd, uint64_t token, uint64_t size)
{
	const char *how = option("fill"), *from = option("from"), *at = option("at");
	int in = from ? open(from, O_RDONLY | O_CLOEXEC) : -1;
	uint64_t order = option_number("order", 0), step = order ? PAGE << order : size;

	if (from && in < 0)
		return -1;
	if (!order && ftruncate(fd, size))
		return -1;
	if (at) {  // only these pages
		for (char *end; *at; at = *end ? end + 1 : end) {
			uint64_t start = strtoull(at, &end, 0) * PAGE;

			if (start < size) {
				size_t n = size - start < PAGE ? size - start : PAGE;

				fill_pattern(token, start, n);
				if (write_all(fd, start, n))
					return -1;
			}
		}
		return 0;
	}
	if (how && !strcmp(how, "none"))
		return 0;
	for (uint64_t done = 0; done < size;) {
		size_t n = size - done < BUFFER ? size - done : BUFFER;

		// A file that has grown by a folio has room for no larger one.
		if (order && done % step == 0 && ftruncate(fd, done + step < size ? done + step : size))
			return -1;
		if (n > step - done % step)
			n = step - done % step;
		if (from) {
			ssize_t got = read(in, buffer, n);

			if (got <= 0) {
				errno = got ? errno : ENODATA;
				return -1;
			}
			n = got;
		} else if (how && !strcmp(how, "zero")) {
			memset(buffer, 0, n);
		} else {
			fill_pattern(token, done, n);
		}
		if (write_all(fd, done, n))
			return -1;
		done += n;
	}
	if (in >= 0)
		close(in);
	return 0;
}

// Memfds get the largest folios that end within the file: "within_size", or none.
static void huge_pages(int on)
{
	int fd = open("/sys/kernel/mm/transparent_hugepage/shmem_enabled", O_WRONLY | O_CLOEXEC);
	const char *value = on ? "within_size" : "never";

	if (fd >= 0 && write(fd, value, strlen(value)) < 0)
		say("warning=shmem_enabled");
	if (fd >= 0)
		close(fd);
}

static void do_file(void)
{
	struct by_token args = { .size = sizeof(args), .token = number(2) };
	uint64_t size = number(3), seals = option_number("seals", 0);
	struct stat st;
	int session = session_fd(1), fd;

	if (session < 0)
		return;
	huge_pages(option_number("order", 0) > 0);
	fd = memfd_create("luo", MFD_ALLOW_SEALING | (unsigned)option_number("flags", 0));
	if (fd < 0 || fill(fd, args.token, size) || ftruncate(fd, size)) {
		failed("make");
		return;
	}
	if (seals && fcntl(fd, F_ADD_SEALS, seals)) {
		failed("seal");
		return;
	}
	lseek(fd, option_number("pos", 0), SEEK_SET);
	args.fd = fd;
	if (ioctl(session, PRESERVE_FD, &args)) {
		failed(NULL);
		close(fd);
		return;
	}
	keep(word(1), 0, args.token, fd);
	fstat(fd, &st);
	say("ok blocks=%ld seals=%#x", (long)st.st_blocks, fcntl(fd, F_GET_SEALS));
}

static void do_write(void)
{
	int i = find(word(1), 0, number(2));
	const char *hex = word(4);
	size_t n = 0;
	unsigned byte;

	if (i < 0) {
		failed_as("file", EBADF);
		return;
	}
	for (; n < BUFFER && sscanf(hex + 2 * n, "%2x", &byte) == 1; n++)
		buffer[n] = byte;
	if (write_all(opened[i].fd, number(3), n))
		failed(NULL);
	else
		say("ok bytes=%zu", n);
}

static void preserve(int session, int fd)
{
	struct by_token args = { .size = sizeof(args), .fd = fd, .token = number(2) };

	if (ioctl(session, PRESERVE_FD, &args))
		failed(NULL);
	else
		say("ok");
}

static void do_preserve(void)
{
	int session = session_fd(1), fd = open(word(3), O_RDWR | O_CLOEXEC);

	if (session < 0)
		return;
	preserve(session, fd);
	if (fd >= 0)
		close(fd);
}

static void do_again(void)
{
	int session = session_fd(1), i = find(word(3), 0, number(4));

	if (session < 0)
		return;
	preserve(session, i < 0 ? -1 : opened[i].fd);
}

static int retrieve(void)
{
	struct by_token args = { .size = sizeof(args), .token = number(2) };
	int session = session_fd(1);

	if (session < 0)
		return -1;
	if (ioctl(session, RETRIEVE_FD, &args)) {
		failed(NULL);
		return -1;
	}
	keep(word(1), 0, args.token, args.fd);
	return args.fd;
}

static void do_retrieve(void)
{
	int only_crc = !strcmp(word(3), "crc");
	char digest[65] = "";
	struct sha256 sha;
	struct stat st;
	uint32_t crc = 0;
	long long pos;
	int fd = retrieve();

	if (fd < 0)
		return;
	pos = lseek(fd, 0, SEEK_CUR);
	fstat(fd, &st);
	sha_start(&sha);
	for (int64_t done = 0; done < st.st_size;) {
		ssize_t n = pread(fd, buffer, BUFFER, done);

		if (n <= 0) {
			errno = n ? errno : ENODATA;
			failed("read");
			return;
		}
		crc = crc32_add(crc, buffer, n);
		if (!only_crc)
			sha_add(&sha, buffer, n);
		done += n;
	}
	if (!only_crc)
		sha_text(&sha, digest);
	say("ok session=%s token=%#llx size=%lld pos=%lld seals=%#x blocks=%ld crc32=%08x sha256=%s",
	    word(1), (unsigned long long)number(2), (long long)st.st_size, pos, fcntl(fd, F_GET_SEALS),
	    (long)st.st_blocks, crc, digest);
}

static void do_bytes(void)
{
	char hex[513] = "";
	size_t want = number(4) < 256 ? number(4) : 256;
	int i = find(word(1), 0, number(2)), fd = i < 0 ? retrieve() : opened[i].fd;
	ssize_t n;

	if (fd < 0)
		return;
	n = pread(fd, buffer, want, number(3));
	for (ssize_t i = 0; i < n; i++)
		sprintf(hex + 2 * i, "%02x", buffer[i]);
	if (n < 0)
		failed(NULL);
	else
		say("ok hex=%s", hex);
}

// ---- kexec ----

static void cpio_entry(int out, const char *name, const struct stat *st, int in)
{
	static unsigned inode = 1;
	char head[128];
	static const char zero[4];
	size_t n = strlen(name) + 1, size = in < 0 ? 0 : st->st_size;
	ssize_t part;

	snprintf(head, sizeof(head), "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", inode++,
		 st->st_mode, 0, 0, 1, 0, (unsigned)size, 0, 0, 0, 0, (unsigned)n, 0);
	if (write(out, head, 110) < 0 || write(out, name, n) < 0 ||
	    write(out, zero, (4 - (110 + n) % 4) % 4) < 0)
		return;
	while (in >= 0 && (part = read(in, buffer, BUFFER)) > 0)
		if (write(out, buffer, part) < 0)
			return;
	if (write(out, zero, (4 - size % 4) % 4) < 0)
		return;
}

// An initramfs with the files of this one: the regular ones in /.
static int pack_self(void)
{
	int out = memfd_create("initrd", 0);
	struct stat st = { 0 };
	struct dirent *entry;
	DIR *root = opendir("/");

	while (root && (entry = readdir(root)))
		if (!lstat(entry->d_name, &st) && S_ISREG(st.st_mode)) {
			int in = open(entry->d_name, O_RDONLY | O_CLOEXEC);

			cpio_entry(out, entry->d_name, &st, in);
			close(in);
		}
	closedir(root);
	memset(&st, 0, sizeof(st));
	cpio_entry(out, "TRAILER!!!", &st, -1);
	lseek(out, 0, SEEK_SET);
	return out;
}

static void do_kexec_load(void)
{
	const char *initrd = option("initrd");
	char line[4096] = "";
	int image = open(word(1), O_RDONLY | O_CLOEXEC), ramdisk = -1;
	unsigned long flags = 0;

	if (image < 0) {
		failed("image");
		return;
	}
	for (int i = 2; i < nr_words; i++)
		if (strncmp(words[i], "initrd=", 7)) {
			strncat(line, line[0] ? " " : "", sizeof(line) - strlen(line) - 1);
			strncat(line, words[i], sizeof(line) - strlen(line) - 1);
		}
	if (initrd && !strcmp(initrd, "none"))
		flags = 4;  // KEXEC_FILE_NO_INITRAMFS
	else if (initrd && strcmp(initrd, "self"))
		ramdisk = open(initrd, O_RDONLY | O_CLOEXEC);
	else
		ramdisk = pack_self();
	if (ramdisk < 0 && !flags)
		failed("initrd");
	else if (syscall(SYS_kexec_file_load, image, ramdisk, strlen(line) + 1, line, flags))
		failed(NULL);
	else
		say("ok");
	close(image);
	if (ramdisk >= 0)
		close(ramdisk);
}

static void do_kexec(void)
{
	say("go");
	syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, NULL);
	failed(NULL);
}

// ---- looking around ----

static void do_cat(int as_hex)
{
	int fd = open(word(1), O_RDONLY | O_CLOEXEC);
	char hex[2 * 256 + 1];
	ssize_t n;

	if (fd < 0) {
		failed(NULL);
		return;
	}
	if (as_hex) {
		while ((n = read(fd, buffer, 256)) > 0) {
			for (ssize_t i = 0; i < n; i++)
				sprintf(hex + 2 * i, "%02x", buffer[i]);
			say("hex=%s", hex);
		}
	} else {
		FILE *f = fdopen(fd, "r");
		char text[800];

		while (fgets(text, sizeof(text), f)) {
			text[strcspn(text, "\n")] = 0;
			say("| %s", text);
		}
		fclose(f);
		fd = -1;
	}
	if (fd >= 0)
		close(fd);
	say("ok");
}

static void do_ls(void)
{
	DIR *dir = opendir(word(1));
	struct dirent *entry;

	if (!dir) {
		failed(NULL);
		return;
	}
	while ((entry = readdir(dir)))
		if (entry->d_name[0] != '.')
			say("| %s", entry->d_name);
	closedir(dir);
	say("ok");
}

static void do_set(void)
{
	int fd = open(word(1), O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, word(2), strlen(word(2))) < 0)
		failed(NULL);
	else
		say("ok");
	if (fd >= 0)
		close(fd);
}

static void power_off(void)
{
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static void run_line(void)
{
	if (!strcmp(command, "open")) {
		do_open();
	} else if (!strcmp(command, "close-device")) {
		close(device);
		device = -1;
		say("ok");
	} else if (!strcmp(command, "create")) {
		do_session(CREATE_SESSION);
	} else if (!strcmp(command, "retrieve-session")) {
		do_session(RETRIEVE_SESSION);
	} else if (!strcmp(command, "name")) {
		do_name();
	} else if (!strcmp(command, "finish")) {
		do_finish();
	} else if (!strcmp(command, "close")) {
		do_close();
	} else if (!strcmp(command, "file")) {
		do_file();
	} else if (!strcmp(command, "write")) {
		do_write();
	} else if (!strcmp(command, "preserve")) {
		do_preserve();
	} else if (!strcmp(command, "again")) {
		do_again();
	} else if (!strcmp(command, "retrieve")) {
		do_retrieve();
	} else if (!strcmp(command, "bytes")) {
		do_bytes();
	} else if (!strcmp(command, "kexec-load")) {
		do_kexec_load();
	} else if (!strcmp(command, "kexec")) {
		do_kexec();
	} else if (!strcmp(command, "cat")) {
		do_cat(0);
	} else if (!strcmp(command, "hex")) {
		do_cat(1);
	} else if (!strcmp(command, "ls")) {
		do_ls();
	} else if (!strcmp(command, "set")) {
		do_set();
	} else if (!strcmp(command, "echo")) {
		say("ok %s", word(1));
	} else if (!strcmp(command, "sleep")) {
		usleep(number(1) * 1000);
		say("ok");
	} else if (!strcmp(command, "poweroff")) {
		say("ok");
		power_off();
	} else if (!strcmp(command, "halt")) {
		say("ok");
		for (;;)
			pause();
	} else {
		failed_as("command", ENOSYS);
	}
}

int main(void)
{
	const char *path = getenv("luo_script");
	static char line[MAX_LINE];
	struct utsname names;
	FILE *script;

	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL);
	kmsg = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
	chdir("/");
	command = "start";
	uname(&names);
	say("ok release=%s script=%s", names.release, path ? path : "/script");
	script = fopen(path ? path : "/script", "re");
	if (!script) {
		failed("script");
		power_off();
	}
	while (fgets(line, sizeof(line), script)) {
		line_number++;
		split(line);
		if (!nr_words || words[0][0] == '#')
			continue;
		command = words[0];
		run_line();
	}
	command = "end";
	say("ok");
	power_off();
}
