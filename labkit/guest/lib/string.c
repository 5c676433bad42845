/* SPDX-License-Identifier: MIT */
/* string.c: plain loops; weak, so that a guest may bring its own. */
#include "labkit.h"

#define WEAK __attribute__((weak))
typedef u64 __attribute__((aligned(1), may_alias)) any_u64;

WEAK void *memcpy(void *dst, const void *src, size_t n)
{
	u8 *d = dst;
	const u8 *s = src;

	for (; n >= 8; n -= 8, d += 8, s += 8)
		*(any_u64 *)d = *(const any_u64 *)s;
	while (n--)
		*d++ = *s++;
	return dst;
}

WEAK void *memmove(void *dst, const void *src, size_t n)
{
	if (dst <= src) /* forwards, and memcpy() goes forwards */
		return memcpy(dst, src, n);
	while (n--)
		((u8 *)dst)[n] = ((const u8 *)src)[n];
	return dst;
}

WEAK void *memset(void *dst, int byte, size_t n)
{
	u8 *d = dst;

	for (; n >= 8; n -= 8, d += 8)
		*(any_u64 *)d = 0x0101010101010101UL * (u8)byte;
	while (n--)
		*d++ = byte;
	return dst;
}

WEAK int memcmp(const void *a, const void *b, size_t n)
{
	const u8 *p = a, *q = b;

	for (; n && *p == *q; n--)
		p++, q++;
	return n ? *p - *q : 0;
}

WEAK size_t strnlen(const char *s, size_t n)
{
	size_t i = 0;

	while (i < n && s[i])
		i++;
	return i;
}

WEAK size_t strlen(const char *s)
{
	return strnlen(s, PTRDIFF_MAX);
}

WEAK int strcmp(const char *a, const char *b)
{
	for (; *a && *a == *b; a++)
		b++;
	return (u8)*a - (u8)*b;
}
