/*
 * The walk of a page-table tree for Unicorn's TLB, on a machine whose memory has two views: what DRAM holds (raw) and what
 * the guest's key makes of it (plain). tests/build_native.py builds it into mmu_code.py; Unicorn calls it at every TLB miss.
 */
typedef unsigned long long u64;
typedef unsigned char u8;

/* State of a page. SEEN: the TLB may hold it; WROTE: how the guest wrote it last. */
enum { PLAIN_STALE = 1, RAW_STALE = 2, PLAIN_SEEN = 4, RAW_SEEN = 8, WROTE_PRIVATE = 16, WROTE_SHARED = 32,
       ASSIGNED = 64, UNUSABLE = 128 };	/* SNP: a guest's, so no shared write; not this guest's to use privately */
enum { READ = 16, WRITE = 17, FETCH = 18 };				/* uc_mem_type */
enum { CR0, CR3, CR4, EFLAGS, CS };					/* struct mmu: regs */
enum { NOTHING, FAULT, NONCANONICAL, NEED, NOT_YOURS };				/* struct mmu: why */
enum { P = 1, W = 2, U = 4, A = 32, D = 64, PS = 128 };
#define NX (1ull << 63)

struct slot { u64 gpa, size; u8 *raw, *plain, *state; };
struct mmu {
	int (*reg_read)(void *uc, int reg, void *value);
	u64 regs[5];		/* libunicorn's numbers */
	u64 nxe, levels, frame, reserved, c_bit, inverted, plain_at, peek, ring, probed, probe_at;	/* ring 4: as CS says */
	u64 why, code, gva, gpa, type;
	u64 nr_slots;
	struct slot slots[16];
};
struct entry { u64 paddr; int perms; };
struct walk { u64 entry, rights, nx, size, gpa; u64 *path[5]; u8 *state[5]; int depth; };

static int walk(void *uc, u64 gva, int type, struct mmu *m, struct walk *w);
static int view(u64 gva, int type, struct entry *out, struct mmu *m, struct walk *w, int writable);

static u64 reg(struct mmu *m, void *uc, int which)
{
	u64 value = 0;

	m->reg_read(uc, (int)m->regs[which], &value);
	return value;
}

static struct slot *find(struct mmu *m, u64 gpa)
{
	for (u64 i = 0; i < m->nr_slots; i++)
		if (gpa - m->slots[i].gpa < m->slots[i].size)
			return &m->slots[i];
	return 0;
}

static int stop(struct mmu *m, u64 why, u64 gva, u64 gpa, u64 code)
{
	m->why = why, m->gva = gva, m->gpa = gpa, m->code = code;
	return 0;
}

/* Unicorn's callback: the view and the rights for one page of gvas, or 0 with the reason in m. */
int fill(void *uc, u64 gva, int type, struct entry *out, struct mmu *m)
{
	struct walk w;
	u64 cr0 = reg(m, uc, CR0), cr4 = reg(m, uc, CR4), user = (m->ring == 4 ? reg(m, uc, CS) & 3 : m->ring) == 3, strict = user || cr0 >> 16 & 1;
	u64 code = (type == WRITE) * W | user * U | (type == FETCH && (m->nxe || cr4 >> 20 & 1)) * 16, want = type == WRITE ? A | D : A;

	if (m->probe_at && gva >> 12 == m->probed >> 12) {	/* where in this page does an instruction touch it? */
		out->paddr = m->probe_at, out->perms = 3;
		return 1;
	}
	m->why = NOTHING, m->type = type;
	if ((u64)((long long)(gva << (52 - 9 * m->levels)) >> (52 - 9 * m->levels)) != gva)
		return stop(m, NONCANONICAL, gva, 0, 0);
	w.depth = 0, w.rights = W | U, w.nx = 0;
	if (!walk(uc, gva, type, m, &w)) {
		m->code |= m->why == NOT_YOURS ? 0 : code;
		return 0;
	}
	if ((type == FETCH && w.nx) || (user && !(w.rights & U)) || (type == WRITE && !(w.rights & W) && strict) ||
	    (type == FETCH && !user && w.rights & U && cr4 >> 20 & 1) ||
	    (type != FETCH && !user && w.rights & U && cr4 >> 21 & 1 && !(reg(m, uc, EFLAGS) >> 18 & 1)))
		return stop(m, FAULT, gva, w.gpa, code | P);
	for (int i = 0; i < w.depth && !m->peek; i++) {
		u64 bits = i == w.depth - 1 ? want : A;

		if ((*w.path[i] & bits) == bits)
			continue;
		if (*w.state[i] & RAW_SEEN)
			return stop(m, NEED, gva, m->gpa, 0);
		*w.path[i] |= bits, *w.state[i] |= RAW_STALE | WROTE_PRIVATE;
	}
	return view(gva, type, out, m, &w, (w.rights & W || !strict) && *w.path[w.depth - 1] & D);
}

/* Through the tables, which are read through the key: SEV has the walker always private. */
static int walk(void *uc, u64 gva, int type, struct mmu *m, struct walk *w)
{
	u64 table = reg(m, uc, CR3) & m->frame;

	for (int level = (int)m->levels - 1;; level--) {
		u64 at = table + (gva >> (12 + 9 * level) & 511) * 8, low = (1ull << (12 + 9 * level)) - 1;
		struct slot *s = find(m, at);

		if (!s)
			return stop(m, FAULT, gva, at, 0);	/* no memslot: nothing is there */
		w->state[w->depth] = &s->state[(at - s->gpa) >> 12];
		w->path[w->depth] = (u64 *)(s->plain + (at - s->gpa));
		if (*w->state[w->depth] & UNUSABLE)
			return stop(m, NOT_YOURS, gva, at, 2);
		if (*w->state[w->depth] & PLAIN_STALE)
			return stop(m, NEED, gva, at, 0);
		m->gpa = at;
		w->entry = *w->path[w->depth++];
		if (!(w->entry & P))
			return stop(m, FAULT, gva, at, 0);
		if (w->entry & m->reserved || (w->entry & NX && !m->nxe) || (level > 2 && w->entry & PS) ||
		    (level && w->entry & PS && w->entry & m->frame & low & ~0x1fffull))
			return stop(m, FAULT, gva, at, P | 8);
		w->rights &= w->entry, w->nx |= w->entry & NX;
		if (!level || w->entry & PS) {
			w->gpa = (w->entry & m->frame & ~low) | (gva & low & ~4095ull);
			return 1;
		}
		table = w->entry & m->frame;
	}
}

/* Which of the two views the page shows, and whether it may be written without asking again. */
static int view(u64 gva, int type, struct entry *out, struct mmu *m, struct walk *w, int writable)
{
	int private = !!(w->entry & m->c_bit) ^ !!m->inverted;
	struct slot *s = find(m, w->gpa);

	out->paddr = w->gpa;
	out->perms = 1 | (writable ? 2 : 0) | (w->nx ? 0 : 4);
	m->gpa = w->gpa, m->code = w->entry;
	if (!s || (m->peek && type != FETCH))
		return 1;			/* without memslot: Unicorn finds nothing there and says so */
	if (!private)
		out->perms = type == FETCH ? 4 : out->perms & 3;
	private |= type == FETCH;		/* fetches always go through the key */

	u8 *state = &s->state[(w->gpa - s->gpa) >> 12], now = *state;
	u8 stale = private ? PLAIN_STALE : RAW_STALE, spoils = private ? RAW_STALE : PLAIN_STALE;
	u8 mine = private ? PLAIN_SEEN : RAW_SEEN, other = private ? RAW_SEEN : PLAIN_SEEN;

	if (private ? now & UNUSABLE : type == WRITE && now & ASSIGNED)
		return stop(m, NOT_YOURS, gva, w->gpa, private);
	if (m->peek)
		return 1;
	if (now & stale || (type == WRITE && now & other))
		return stop(m, NEED, gva, w->gpa, 0);
	if (type == WRITE)
		now = (now & ~(WROTE_PRIVATE | WROTE_SHARED)) | spoils | (private ? WROTE_PRIVATE : WROTE_SHARED);
	else if (!(now & spoils) || (!private && now & ASSIGNED))
		out->perms &= ~2;		/* until it is written, the other view stays good */
	*state = now | mine;
	if (private)
		out->paddr += m->plain_at;
	return 1;
}
