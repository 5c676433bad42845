/*
 * What a compiler calls for integer operations that the processor lacks: libgcc and compiler-rt have these names
 * (https://gcc.gnu.org/onlinedocs/gccint/Integer-library-routines.html). Linked into a guest only when it needs one of them.
 */
typedef int s32;
typedef unsigned int u32;
typedef long long s64;
typedef unsigned long long u64;
typedef __int128 s128;
typedef unsigned __int128 u128;

#define HALF(value) ((u64)((value) >> 64))

/* --- counting bits */

int __popcountdi2(u64 a)
{
	a -= a >> 1 & 0x5555555555555555ull;
	a = (a & 0x3333333333333333ull) + (a >> 2 & 0x3333333333333333ull);
	a = (a + (a >> 4)) & 0x0f0f0f0f0f0f0f0full;
	return a * 0x0101010101010101ull >> 56;
}

int __popcountsi2(u32 a) { return __popcountdi2(a); }
int __popcountti2(u128 a) { return __popcountdi2(a) + __popcountdi2(HALF(a)); }
int __paritysi2(u32 a) { return __popcountdi2(a) & 1; }
int __paritydi2(u64 a) { return __popcountdi2(a) & 1; }
int __parityti2(u128 a) { return __popcountti2(a) & 1; }

/* Leading and trailing zeros of 0 are undefined. */
int __clzdi2(u64 a)
{
	int zeros = 0;

	for (int shift = 32; shift; shift >>= 1) {
		if (!(a >> (64 - shift))) {
			a <<= shift;
			zeros += shift;
		}
	}
	return zeros;
}

int __clzsi2(u32 a) { return __clzdi2((u64)a << 32); }
int __clzti2(u128 a) { return HALF(a) ? __clzdi2(HALF(a)) : 64 + __clzdi2(a); }
int __ctzdi2(u64 a) { return 63 - __clzdi2(a & -a); }
int __ctzsi2(u32 a) { return __ctzdi2(a); }
int __ctzti2(u128 a) { return (u64)a ? __ctzdi2(a) : 64 + __ctzdi2(HALF(a)); }
int __ffssi2(s32 a) { return a ? __ctzdi2((u32)a) + 1 : 0; }
int __ffsdi2(s64 a) { return a ? __ctzdi2(a) + 1 : 0; }
int __ffsti2(s128 a) { return a ? __ctzti2(a) + 1 : 0; }

/* Bits behind the sign that are the same. */
int __clrsbdi2(s64 a)
{
	u64 rest = a < 0 ? ~a : a;

	return rest ? __clzdi2(rest) - 1 : 63;
}

int __clrsbsi2(s32 a) { return __clrsbdi2(a) - 32; }

int __clrsbti2(s128 a)
{
	u128 rest = a < 0 ? ~a : a;

	return rest ? __clzti2(rest) - 1 : 127;
}

u32 __bswapsi2(u32 a) { return a >> 24 | (a >> 8 & 0xff00) | (a << 8 & 0xff0000) | a << 24; }
u64 __bswapdi2(u64 a) { return (u64)__bswapsi2(a) << 32 | __bswapsi2(a >> 32); }

/* --- 128 bits */

u128 __ashlti3(u128 a, int by)
{
	u64 low = a, high = HALF(a);

	if (by & 64)
		return (u128)(low << (by & 63)) << 64;
	if (!by)
		return a;
	return (u128)(high << by | low >> (64 - by)) << 64 | low << by;
}

u128 __lshrti3(u128 a, int by)
{
	u64 low = a, high = HALF(a);

	if (by & 64)
		return high >> (by & 63);
	if (!by)
		return a;
	return (u128)(high >> by) << 64 | (low >> by | high << (64 - by));
}

s128 __ashrti3(s128 a, int by)
{
	u64 low = a;
	s64 high = HALF(a);

	if (by & 64)
		return (s128)(high >> (by & 63));
	if (!by)
		return a;
	return (s128)((u128)(u64)(high >> by) << 64 | (low >> by | (u64)high << (64 - by)));
}

s128 __negti2(s128 a) { return -(u128)a; }
int __cmpti2(s128 a, s128 b) { return a < b ? 0 : a == b ? 1 : 2; }
int __ucmpti2(u128 a, u128 b) { return a < b ? 0 : a == b ? 1 : 2; }

s128 __multi3(s128 a, s128 b)
{
	u64 a0 = (u32)a, a1 = (u64)a >> 32, b0 = (u32)b, b1 = (u64)b >> 32;
	u64 middle = a1 * b0 + (a0 * b0 >> 32);
	u64 cross = a0 * b1 + (u32)middle;
	u64 high = a1 * b1 + (middle >> 32) + (cross >> 32);

	high += (u64)a * HALF(b) + HALF(a) * (u64)b;
	return (s128)((u128)high << 64 | (cross << 32 | (u32)(a0 * b0)));
}

/* Schoolbook division, a bit at a time; division by zero is undefined. */
u128 __udivmodti4(u128 a, u128 b, u128 *rest)
{
	u128 quotient = 0, left = 0;

	for (int bit = 127; bit >= 0; bit--) {
		int carry = HALF(left) >> 63;

		left = left << 1 | (a >> bit & 1);
		if (carry || left >= b) {
			left -= b;
			quotient |= (u128)1 << bit;
		}
	}
	if (rest)
		*rest = left;
	return quotient;
}

u128 __udivti3(u128 a, u128 b) { return __udivmodti4(a, b, 0); }

u128 __umodti3(u128 a, u128 b)
{
	u128 rest;

	__udivmodti4(a, b, &rest);
	return rest;
}

s128 __divmodti4(s128 a, s128 b, s128 *rest)
{
	u128 left, quotient;

	quotient = __udivmodti4(a < 0 ? -(u128)a : (u128)a, b < 0 ? -(u128)b : (u128)b, &left);
	if (rest)
		*rest = a < 0 ? -left : left;
	return (a < 0) != (b < 0) ? -quotient : quotient;
}

s128 __divti3(s128 a, s128 b) { return __divmodti4(a, b, 0); }

s128 __modti3(s128 a, s128 b)
{
	s128 rest;

	__divmodti4(a, b, &rest);
	return rest;
}

/* --- overflow: `overflow` says whether there was one; the v functions end the guest */

s128 __muloti4(s128 a, s128 b, int *overflow)
{
	s128 product = __multi3(a, b);
	s128 lowest = (s128)((u128)1 << 127);

	*overflow = (a == -1 && b == lowest) || (b == -1 && a == lowest);
	if (!*overflow && b && b != -1)
		*overflow = __divti3(product, b) != a;
	return product;
}

s64 __mulodi4(s64 a, s64 b, int *overflow)
{
	s128 product = __multi3(a, b);

	*overflow = product != (s64)product;
	return product;
}

s32 __mulosi4(s32 a, s32 b, int *overflow)
{
	s64 product = (s64)a * b;

	*overflow = product != (s32)product;
	return product;
}

#define CHECKED(suffix, type, wide)								\
	type __addv##suffix##3(type a, type b)							\
	{											\
		wide sum = (wide)a + b;								\
												\
		return sum == (type)sum ? (type)sum : (__builtin_trap(), 0);			\
	}											\
	type __subv##suffix##3(type a, type b)							\
	{											\
		wide difference = (wide)a - b;							\
												\
		return difference == (type)difference ? (type)difference : (__builtin_trap(), 0); \
	}											\
	type __mulv##suffix##3(type a, type b)							\
	{											\
		wide product = (wide)__multi3(a, b);						\
												\
		return product == (type)product ? (type)product : (__builtin_trap(), 0);	\
	}											\
	type __negv##suffix##2(type a) { return __subv##suffix##3(0, a); }			\
	type __absv##suffix##2(type a) { return a < 0 ? __subv##suffix##3(0, a) : a; }

CHECKED(si, s32, s64)
CHECKED(di, s64, s128)
