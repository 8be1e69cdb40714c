/*
 * The preserved map in plain C: a walk from the root of a radix tree for each page, a walk over the
 * tree that calls back for each block, and the list of chunks of kho-v1.
 *
 * The tree has the shape of kho-v4 on pages of 4 KiB: inner nodes of 512 physical addresses, leaves
 * of 32768 bits, six levels. Nodes are taken from an arena that is the caller's, zeroed and touched
 * before; "physical" address 0 is its beginning, so the first page is left out.
 */
#include <stdint.h>
#include <string.h>

enum { PAGE_SHIFT = 12, PAGE = 1 << PAGE_SHIFT, SLOT_BITS = 9, LEAF_BITS = 15, LEVELS = 6 };

struct tree {
	uint8_t *arena;
	uint64_t room; /* bytes of the arena */
	uint64_t used; /* nodes lie below */
	uint64_t root; /* 0: none yet */
};

static uint64_t new_node(struct tree *tree)
{
	uint64_t phys = tree->used;

	if (phys + PAGE > tree->room)
		return 0;
	tree->used = phys + PAGE;
	return phys;
}

static int set_key(struct tree *tree, uint64_t key)
{
	uint64_t *node = (uint64_t *)(tree->arena + tree->root);

	for (int level = LEVELS - 2; level >= 0; level--) {
		uint64_t *slot =
			&node[(key >> (LEAF_BITS + SLOT_BITS * level)) & ((1 << SLOT_BITS) - 1)];

		if (!*slot && !(*slot = new_node(tree)))
			return -1;
		node = (uint64_t *)(tree->arena + *slot);
	}
	key &= (1 << LEAF_BITS) - 1;
	node[key / 64] |= (uint64_t)1 << (key % 64);
	return 0;
}

/* Preserve n blocks, one walk each. Returns 0, or -1 if the arena is full. */
int walk_preserve(struct tree *tree, const uint64_t *phys, uint64_t n, int order)
{
	if (!tree->root) {
		tree->used = PAGE;
		tree->root = new_node(tree);
	}
	for (uint64_t i = 0; i < n; i++) {
		uint64_t key = ((uint64_t)1 << (64 - PAGE_SHIFT - order)) |
			       (phys[i] >> (PAGE_SHIFT + order));

		if (set_key(tree, key))
			return -1;
	}
	return 0;
}

typedef int (*visit)(uint64_t phys, int order, void *ctx);

static int walk(const uint8_t *arena, uint64_t phys, int level, uint64_t key, visit call, void *ctx)
{
	const uint64_t *node = (const uint64_t *)(arena + phys);
	int rc;

	if (level < 0) {
		for (int word = 0; word < PAGE / 8; word++) {
			for (uint64_t bits = node[word]; bits; bits &= bits - 1) {
				uint64_t k = key | (uint64_t)(word * 64 + __builtin_ctzll(bits));
				int marker = 63 - __builtin_clzll(k);
				int order = 64 - PAGE_SHIFT - marker;

				rc = call((k ^ ((uint64_t)1 << marker)) << (PAGE_SHIFT + order),
					  order, ctx);
				if (rc)
					return rc;
			}
		}
		return 0;
	}
	for (uint64_t slot = 0; slot < 1 << SLOT_BITS; slot++) {
		if (!node[slot])
			continue;
		rc = walk(arena, node[slot], level - 1,
			  key | slot << (LEAF_BITS + SLOT_BITS * level), call, ctx);
		if (rc)
			return rc;
	}
	return 0;
}

/* Call back for each block, by ascending key. */
int walk_blocks(const uint8_t *arena, uint64_t root, visit call, void *ctx)
{
	return root ? walk(arena, root, LEVELS - 2, 0, call, ctx) : 0;
}

struct blocks {
	uint64_t *phys;
	uint8_t *orders;
	uint64_t n;
};

static int take(uint64_t phys, int order, void *ctx)
{
	struct blocks *out = ctx;

	out->phys[out->n] = phys;
	out->orders[out->n] = (uint8_t)order;
	out->n++;
	return 0;
}

/* Read a tree into arrays with a callback for each block; returns how many. */
uint64_t walk_decode(const uint8_t *arena, uint64_t root, uint64_t *phys, uint8_t *orders)
{
	struct blocks out = { phys, orders, 0 };
	/* Volatile, or the compiler puts the callback into a copy of the walk. */
	visit volatile call = take;

	walk_blocks(arena, root, call, &out);
	return out.n;
}

struct entry {
	uint64_t phys;
	uint64_t bitmap;
};

struct chunk {
	uint64_t next;
	uint32_t order;
	uint32_t nr;
	struct entry entries[(PAGE - 16) / sizeof(struct entry)];
};

/*
 * Write the list of chunks that names n bitmaps of one order, into pages from phys on. Returns the
 * number of chunks.
 */
uint64_t chunks_publish(uint8_t *arena, uint64_t phys, int order, const uint64_t *first,
			const uint64_t *bitmaps, uint64_t n)
{
	const uint64_t capacity = sizeof(((struct chunk *)0)->entries) / sizeof(struct entry);
	struct chunk *chunk = NULL;
	uint64_t nr_chunks = 0;

	for (uint64_t i = 0; i < n; i++) {
		if (!chunk || chunk->nr == capacity) {
			if (chunk)
				chunk->next = phys + nr_chunks * PAGE;
			chunk = (struct chunk *)(arena + nr_chunks * PAGE);
			memset(chunk, 0, PAGE);
			chunk->order = (uint32_t)order;
			nr_chunks++;
		}
		chunk->entries[chunk->nr].phys = first[i];
		chunk->entries[chunk->nr].bitmap = bitmaps[i];
		chunk->nr++;
	}
	return nr_chunks;
}
