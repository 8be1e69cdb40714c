/*
 * What libfdt does, in C: device trees written from columns, and read back into columns.
 *
 * The peer of luo.fdt's bulk calls, of its calls one by one, and of the records that PREPARE writes.
 * Buffers are the caller's, large enough and touched before.
 */
#include <libfdt.h>
#include <stdint.h>
#include <string.h>

/* Values of one property, a row a node: bytes offsets[i] to offsets[i + 1] of data. */
struct column {
	const char *name;
	uint8_t *data;
	uint64_t *offsets;
	uint8_t *present; /* NULL: every node has it */
};

/*
 * Write nr_nodes siblings below the root, which has "compatible" unless that is NULL.
 * Row i of names is a string with its NUL. Returns the bytes of the tree, or libfdt's -error.
 */
int64_t write_columns(void *fdt, int room, const char *compatible, const struct column *names,
		      const struct column *columns, int nr_columns, uint64_t nr_nodes)
{
	int rc;

	if ((rc = fdt_create(fdt, room)) || (rc = fdt_finish_reservemap(fdt)) ||
	    (rc = fdt_begin_node(fdt, "")))
		return rc;
	if (compatible && (rc = fdt_property_string(fdt, "compatible", compatible)))
		return rc;
	for (uint64_t i = 0; i < nr_nodes; i++) {
		rc = fdt_begin_node(fdt, (const char *)names->data + names->offsets[i]);
		if (rc)
			return rc;
		for (int k = 0; k < nr_columns; k++) {
			const struct column *c = &columns[k];

			if (c->present && !c->present[i])
				continue;
			rc = fdt_property(fdt, c->name, c->data + c->offsets[i],
					  (int)(c->offsets[i + 1] - c->offsets[i]));
			if (rc)
				return rc;
		}
		if ((rc = fdt_end_node(fdt)))
			return rc;
	}
	if ((rc = fdt_end_node(fdt)) || (rc = fdt_finish(fdt)))
		return rc;
	return fdt_totalsize(fdt);
}

static void append(struct column *c, uint64_t row, const void *value, uint64_t nbytes)
{
	memcpy(c->data + c->offsets[row], value, nbytes);
	c->offsets[row + 1] = c->offsets[row] + nbytes;
	if (c->present)
		c->present[row] = 1;
}

static void begin_row(struct column *columns, int nr_columns, uint64_t row)
{
	for (int k = 0; k < nr_columns; k++) {
		columns[k].offsets[row + 1] = columns[k].offsets[row];
		columns[k].present[row] = 0;
	}
}

/*
 * Read the children of the root as the kernel does: a loop over nodes, and one over the properties
 * of each. Returns how many children there are, or libfdt's -error.
 */
int64_t read_nodes(const void *fdt, struct column *names, struct column *columns, int nr_columns)
{
	const char *name, *value;
	int node, property, nbytes;
	uint64_t row = 0;

	names->offsets[0] = 0;
	for (int k = 0; k < nr_columns; k++)
		columns[k].offsets[0] = 0;
	fdt_for_each_subnode(node, fdt, 0) {
		begin_row(columns, nr_columns, row);
		name = fdt_get_name(fdt, node, &nbytes);
		append(names, row, name, (uint64_t)nbytes + 1);
		fdt_for_each_property_offset(property, fdt, node) {
			value = fdt_getprop_by_offset(fdt, property, &name, &nbytes);
			if (!value)
				return nbytes;
			for (int k = 0; k < nr_columns; k++)
				if (!strcmp(columns[k].name, name)) {
					append(&columns[k], row, value, (uint64_t)nbytes);
					break;
				}
		}
		row++;
	}
	return node == -FDT_ERR_NOTFOUND ? (int64_t)row : node;
}

/* The same in one pass over the tags, with the names of properties compared by their offset. */
int64_t read_tags(const void *fdt, struct column *names, struct column *columns, int nr_columns)
{
	enum { MAX_COLUMNS = 64 };
	int nameoff[MAX_COLUMNS];
	int offset = 0, next, depth = 0;
	uint64_t row = 0;

	if (nr_columns > MAX_COLUMNS)
		return -FDT_ERR_INTERNAL;
	names->offsets[0] = 0;
	for (int k = 0; k < nr_columns; k++) {
		nameoff[k] = -1;
		columns[k].offsets[0] = 0;
	}
	for (;; offset = next) {
		uint32_t tag = fdt_next_tag(fdt, offset, &next);

		if (tag == FDT_BEGIN_NODE) {
			if (depth++ == 1) {
				const char *name = fdt_offset_ptr(fdt, offset + FDT_TAGSIZE, 1);

				begin_row(columns, nr_columns, row);
				append(names, row, name, strlen(name) + 1);
			}
		} else if (tag == FDT_PROP && depth == 2) {
			const struct fdt_property *prop =
				fdt_offset_ptr(fdt, offset, sizeof(*prop));
			int at = (int)fdt32_to_cpu(prop->nameoff), k = 0;

			while (k < nr_columns && nameoff[k] != at)
				k++;
			if (k == nr_columns) { /* seen for the first time */
				const char *name = fdt_string(fdt, at);

				for (k = 0; k < nr_columns; k++)
					if (nameoff[k] < 0 && !strcmp(columns[k].name, name))
						break;
				if (k == nr_columns)
					continue;
				nameoff[k] = at;
			}
			append(&columns[k], row, prop->data, fdt32_to_cpu(prop->len));
		} else if (tag == FDT_END_NODE) {
			if (--depth == 1)
				row++;
		} else if (tag == FDT_END) {
			return next < 0 ? next : (int64_t)row;
		}
	}
}
