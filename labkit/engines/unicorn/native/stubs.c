/*
 * Hooks that libunicorn calls inside a run: what must happen at every block costs 2 ns this way, and 1 us as a Python callback.
 * Each is called as hook(uc, gva, size in bytes, data); words.py lays the data out, and tests/build_native.py builds stubs_code.py.
 */
typedef unsigned long long u64;

struct entry { u64 key, count; };	/* key: gva + 1, so that 0 is no block */
struct tally {
	u64 total, block;
	const struct entry *table;	/* open addressing; behind the last hash there are entries that stay empty */
	volatile u64 limit;		/* another thread ends the run with 0 */
	u64 stopped;
	int (*stop)(void *uc);
};

/* A block begins: add its instructions, or end the run before it where they are not known or would go beyond the limit. */
void tally(void *uc, u64 gva, unsigned size, struct tally *t)
{
	const struct entry *entry = &t->table[(gva ^ gva >> 16) & 0xffff];
	u64 total;

	/* Taken branches cost a cycle each, so the way through that is usual has none. */
	while (__builtin_expect(entry->key != gva + 1, 0)) {
		if (!entry->key)
			goto stop;
		entry++;
	}
	total = t->total + entry->count;
	if (__builtin_expect(total > t->limit, 0))
		goto stop;
	t->total = total;
	t->block = gva;
	return;
stop:
	t->stopped = 1;
	t->stop(uc);
}

struct locked {
	u64 count;
	const u64 *counter;		/* its neighbour is the block, when blocks are counted */
	u64 gva, block;
};

/* A locked instruction is about to run. */
void locked(void *uc, u64 gva, unsigned size, struct locked *l)
{
	l->count = l->counter[0];
	l->gva = gva;
	l->block = l->counter[1];
}

struct rep {
	const u64 *counter;
	u64 gva, count, extra, rcx, again;
	int (*reg_read)(void *uc, int reg, void *value);
	u64 rcx_number;			/* libunicorn's */
};

/* An iteration of a REP begins. Unicorn comes once more when none is left: counted, but no step. */
void rep(void *uc, u64 gva, unsigned size, struct rep *r)
{
	u64 count = r->counter[0];

	r->reg_read(uc, (int)r->rcx_number, &r->rcx);
	r->again = r->gva == gva && r->count + 1 == count;
	if (r->again && !r->rcx)
		r->extra++;
	r->gva = gva;
	r->count = count;
}

struct check {
	int (*reg_read)(void *uc, int reg, void *value);
	int (*stop)(void *uc);
	u64 base, index, scale, segment;	/* numbers of libunicorn's registers, 0 for none */
	u64 displacement, mask;
};

/* End the run before an instruction whose operand's address, or a register, has one of the bits in mask. */
void check(void *uc, u64 gva, unsigned size, const struct check *c)
{
	u64 sum = c->displacement, value;

	if (c->base) {
		c->reg_read(uc, (int)c->base, &value);
		sum += value;
	}
	if (c->index) {
		c->reg_read(uc, (int)c->index, &value);
		sum += value * c->scale;
	}
	if (c->segment) {
		c->reg_read(uc, (int)c->segment, &value);
		sum += value;
	}
	if (sum & c->mask)
		c->stop(uc);
}
