/* SPDX-License-Identifier: MIT */
/* labkit.h: what guest code includes. Names and layouts are those of the Linux 6.12 KVM selftests; the text is labkit's own. */
#ifndef LABKIT_H
#define LABKIT_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* --- types and small words of the kernel --- */
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef uint64_t vm_vaddr_t;
typedef uint64_t vm_paddr_t;

#ifdef LABKIT_NOINLINE_IS_AN_ATTRIBUTE /* the source has __attribute__((noinline)), which the kernel's macro would break */
#define noinline __noinline__
#else
#define noinline __attribute__((__noinline__))
#endif
#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif
#define __aligned(n) __attribute__((aligned(n)))
#define __packed __attribute__((packed))
#define __maybe_unused __attribute__((unused))
#define __stringify_1(x...) #x
#define __stringify(x...) __stringify_1(x)

#define BIT(n) (1UL << (n))
#define BIT_ULL(n) (1ULL << (n))
#define GENMASK(high, low) ((~0UL >> (63 - (high))) & (~0UL << (low)))
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#define DIV_ROUND_UP(n, d) (((n) + (d) - 1) / (d))
#define DECLARE_BITMAP(name, bits) unsigned long name[DIV_ROUND_UP(bits, 64)]
#define min(a, b) ({ __typeof__(a) a_ = (a); __typeof__(b) b_ = (b); a_ < b_ ? a_ : b_; })
#define max(a, b) ({ __typeof__(a) a_ = (a); __typeof__(b) b_ = (b); a_ > b_ ? a_ : b_; })
#define PAGE_SHIFT 12
#define PAGE_SIZE (1UL << PAGE_SHIFT)
#define PAGE_MASK (~(PAGE_SIZE - 1))

/* --- memory order: what the compiler must not move --- */
#define barrier() __asm__ volatile("" : : : "memory")
#define READ_ONCE(x) (*(const volatile __typeof__(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile __typeof__(x) *)&(x) = (value))
#define smp_mb() __sync_synchronize()

typedef struct { int counter; } atomic_t;
#define ATOMIC_INIT(n) { (n) }
static inline int atomic_read(const atomic_t *v) { return READ_ONCE(v->counter); }
static inline void atomic_set(atomic_t *v, int n) { WRITE_ONCE(v->counter, n); }
static inline void atomic_inc(atomic_t *v) { __sync_fetch_and_add(&v->counter, 1); }
static inline void atomic_dec(atomic_t *v) { __sync_fetch_and_sub(&v->counter, 1); }
static inline void atomic_add(int n, atomic_t *v) { __sync_fetch_and_add(&v->counter, n); }
static inline int atomic_add_return(int n, atomic_t *v) { return __sync_add_and_fetch(&v->counter, n); }
static inline int atomic_inc_return(atomic_t *v) { return atomic_add_return(1, v); }
static inline int atomic_dec_return(atomic_t *v) { return atomic_add_return(-1, v); }
static inline bool atomic_dec_and_test(atomic_t *v) { return atomic_dec_return(v) == 0; }
static inline int atomic_cmpxchg(atomic_t *v, int old, int new) { return __sync_val_compare_and_swap(&v->counter, old, new); }

/* --- strings: the compiler calls the first four on its own account --- */
void *memcpy(void *dst, const void *src, size_t n);
void *memmove(void *dst, const void *src, size_t n);
void *memset(void *dst, int byte, size_t n);
int memcmp(const void *a, const void *b, size_t n);
size_t strlen(const char *s);
size_t strnlen(const char *s, size_t n);
int strcmp(const char *a, const char *b);

/* --- text: conversions d i u o x X c s p n %, flags -+ #0, width and precision (also *), qualifiers h l ll L; no floats --- */
int guest_vsnprintf(char *buf, int n, const char *fmt, va_list args);
int guest_snprintf(char *buf, int n, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* --- ucalls: a guest's call to its host --- */
enum { UCALL_NONE, UCALL_SYNC, UCALL_ABORT, UCALL_PRINTF, UCALL_DONE, UCALL_UNHANDLED };

#define UCALL_MAX_ARGS 7
#define UCALL_BUFFER_LEN 1024
#define KVM_MAX_VCPUS 512
#define GUEST_UCALL_FAILED ((vm_vaddr_t)-1)

struct ucall {
	uint64_t cmd;
	uint64_t args[UCALL_MAX_ARGS];
	char buffer[UCALL_BUFFER_LEN];
	struct ucall *hva; /* where the host has this struct; the host writes it */
};

struct ucall_header {
	DECLARE_BITMAP(in_use, KVM_MAX_VCPUS);
	struct ucall ucalls[KVM_MAX_VCPUS];
};

void ucall_arch_do_ucall(vm_vaddr_t uc);
void ucall(uint64_t cmd, int nargs, ...);
void ucall_unhandled(uint64_t vector, uint64_t error_code, uint64_t pc, uint64_t fault_gva);
void ucall_fmt(uint64_t cmd, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void ucall_assert(uint64_t cmd, const char *exp, const char *file, unsigned int line, const char *fmt, ...)
	__attribute__((format(printf, 5, 6)));

/* Arguments are widened here: an int on the stack of a variadic call has no defined upper half. */
#define U64_(x) ((uint64_t)(x))
#define GUEST_UCALL_NONE() ucall_arch_do_ucall(0)
#define GUEST_SYNC(stage) ucall(UCALL_SYNC, 2, "hello", U64_(stage))
#define GUEST_SYNC_ARGS(stage, a, b, c, d) ucall(UCALL_SYNC, 6, "hello", U64_(stage), U64_(a), U64_(b), U64_(c), U64_(d))
#define GUEST_SYNC1(a) ucall(UCALL_SYNC, 1, U64_(a))
#define GUEST_SYNC2(a, b) ucall(UCALL_SYNC, 2, U64_(a), U64_(b))
#define GUEST_SYNC3(a, b, c) ucall(UCALL_SYNC, 3, U64_(a), U64_(b), U64_(c))
#define GUEST_SYNC4(a, b, c, d) ucall(UCALL_SYNC, 4, U64_(a), U64_(b), U64_(c), U64_(d))
#define GUEST_SYNC5(a, b, c, d, e) ucall(UCALL_SYNC, 5, U64_(a), U64_(b), U64_(c), U64_(d), U64_(e))
#define GUEST_SYNC6(a, b, c, d, e, f) ucall(UCALL_SYNC, 6, U64_(a), U64_(b), U64_(c), U64_(d), U64_(e), U64_(f))
#define GUEST_PRINTF(fmt, args...) ucall_fmt(UCALL_PRINTF, fmt, ##args)
#define GUEST_DONE() ucall(UCALL_DONE, 0)

enum guest_assert_builtin_args { GUEST_ERROR_STRING, GUEST_FILE, GUEST_LINE, GUEST_ASSERT_BUILTIN_NARGS };

#define ____GUEST_ASSERT(cond, exp, fmt, args...) \
	({ if (!(cond)) ucall_assert(UCALL_ABORT, exp, __FILE__, __LINE__, fmt, ##args); })
#define __GUEST_ASSERT(cond, fmt, args...) ____GUEST_ASSERT(cond, #cond, fmt, ##args)
#define GUEST_ASSERT(cond) ____GUEST_ASSERT(cond, #cond, "%s", #cond)
#define GUEST_FAIL(fmt, args...) ucall_assert(UCALL_ABORT, "the guest gave up", __FILE__, __LINE__, fmt, ##args)
#define GUEST_COMPARE_(a, op, b, shown) ({ \
	__typeof__(a) a_ = (a); \
	__typeof__(b) b_ = (b); \
	____GUEST_ASSERT(a_ op b_, #a " " #op " " #b, "%s " shown " %s: found %#lx and %#lx", \
			 #a, #b, (unsigned long)a_, (unsigned long)b_); })
#define GUEST_ASSERT_EQ(a, b) GUEST_COMPARE_(a, ==, b, "==")
#define GUEST_ASSERT_NE(a, b) GUEST_COMPARE_(a, !=, b, "!=")

#if defined(__x86_64__)
#include "x86_64/processor.h"
#elif defined(__aarch64__)
#include "arm64/processor.h"
#elif defined(__riscv) && __riscv_xlen == 64
#include "riscv64/processor.h"
#elif defined(__s390x__)
#include "s390x/processor.h"
#else
#error "labkit.h has no part for this architecture"
#endif

/* The guest's way to do what the host does with vm_install_exception_handler(). */
static inline void set_exception_handler(int vector, exception_handler_t handler)
{
	((volatile exception_handler_t *)exception_handlers)[vector] = handler;
}

/* --- bitmaps, where the processor has no instruction of its own for them --- */
#ifndef LABKIT_OWN_BITMAPS
#define BIT_MASK_(nr) (1UL << ((nr) % 64))
static __always_inline bool test_and_set_bit(unsigned long nr, volatile unsigned long *bitmap)
{
	return __atomic_fetch_or(&bitmap[nr / 64], BIT_MASK_(nr), __ATOMIC_SEQ_CST) & BIT_MASK_(nr);
}

static __always_inline bool test_and_clear_bit(unsigned long nr, volatile unsigned long *bitmap)
{
	return __atomic_fetch_and(&bitmap[nr / 64], ~BIT_MASK_(nr), __ATOMIC_SEQ_CST) & BIT_MASK_(nr);
}
#endif

static __always_inline void set_bit(unsigned long nr, volatile unsigned long *bitmap) { (void)test_and_set_bit(nr, bitmap); }
static __always_inline void clear_bit(unsigned long nr, volatile unsigned long *bitmap) { (void)test_and_clear_bit(nr, bitmap); }
static inline bool test_bit(unsigned long nr, const volatile unsigned long *bitmap) { return bitmap[nr / 64] >> (nr % 64) & 1; }

#endif
