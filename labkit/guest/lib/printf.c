/* SPDX-License-Identifier: MIT */
/* printf.c: text for the host. Takes the format strings that guest_vsnprintf() of the kernel selftests takes, with the same result. */
#include "labkit.h"

enum { LEFT = 1, PLUS = 2, SPACE = 4, SPECIAL = 8, ZERO = 16, SIGNED = 32, LOWER = 64, WIDTH = 128 };

struct out {
	char *at, *last; /* last: the byte kept for the NUL */
	bool full;
};

struct spec {
	int flags, width, precision; /* precision: -1 when absent */
	char qualifier;
};

static void put(struct out *out, char c)
{
	if (out->at < out->last)
		*out->at++ = c;
	else
		out->full = true;
}

static void pad(struct out *out, char c, int n)
{
	while (n-- > 0 && !out->full)
		put(out, c);
}

static void put_number(struct out *out, u64 value, unsigned int base, struct spec spec)
{
	const char *digits = spec.flags & LOWER ? "0123456789abcdef" : "0123456789ABCDEF";
	const char *prefix = "";
	char reversed[24];
	int n = 0, zeros, space;

	if (spec.flags & SIGNED && (s64)value < 0) {
		prefix = "-";
		value = -value;
	} else if (spec.flags & SIGNED && spec.flags & (PLUS | SPACE)) {
		prefix = spec.flags & PLUS ? "+" : " ";
	} else if (spec.flags & SPECIAL && base != 10) {
		prefix = base == 16 ? "0x" : "0";
	}
	do
		reversed[n++] = digits[value % base];
	while (value /= base);

	zeros = max(spec.precision - n, 0);
	space = spec.width - (int)strlen(prefix) - n - zeros;
	if (!(spec.flags & (LEFT | ZERO)))
		pad(out, ' ', space);
	while (*prefix)
		put(out, *prefix++);
	if ((spec.flags & (LEFT | ZERO)) == ZERO)
		pad(out, '0', space);
	pad(out, '0', zeros);
	while (n)
		put(out, reversed[--n]);
	if (spec.flags & LEFT)
		pad(out, ' ', space);
}

static void put_string(struct out *out, const char *s, int n, struct spec spec)
{
	if (!(spec.flags & LEFT))
		pad(out, ' ', spec.width - n);
	for (int i = 0; i < n && !out->full; i++)
		put(out, s[i]);
	if (spec.flags & LEFT)
		pad(out, ' ', spec.width - n);
}

static bool is_digit(char c)
{
	return c >= '0' && c <= '9';
}

/* Digits, or a * that stands for the next argument, or nothing, which is 0. */
static int parse_int(const char **fmt, va_list *args)
{
	int n = 0;

	if (**fmt == '*') {
		++*fmt;
		n = va_arg(*args, int);
		return max(n, -INT32_MAX);
	}
	for (; is_digit(**fmt); ++*fmt)
		n = n < 100000000 ? n * 10 + (**fmt - '0') : n;
	return n;
}

static int flag_of(char c)
{
	static const char letters[] = "-+ #0"; /* in the order of the enum's bits */

	for (int i = 0; c && letters[i]; i++)
		if (letters[i] == c)
			return 1 << i;
	return 0;
}

/* Everything between the % and the conversion letter. */
static struct spec parse_spec(const char **fmt, va_list *args)
{
	struct spec spec = { .precision = -1 };

	while (flag_of(**fmt))
		spec.flags |= flag_of(*(*fmt)++);
	if (**fmt == '*' || is_digit(**fmt))
		spec.flags |= WIDTH;
	spec.width = parse_int(fmt, args);
	if (spec.width < 0) {
		spec.flags |= LEFT;
		spec.width = -spec.width;
	}
	if (**fmt == '.') {
		++*fmt;
		spec.precision = parse_int(fmt, args);
		spec.precision = max(spec.precision, 0);
	}
	if (**fmt == 'h' || **fmt == 'l' || **fmt == 'L')
		spec.qualifier = *(*fmt)++;
	if (spec.qualifier == 'l' && **fmt == 'l')
		++*fmt;
	return spec;
}

static u64 integer_arg(struct spec spec, va_list *args)
{
	int value;

	if (spec.qualifier == 'l')
		return va_arg(*args, u64);
	value = va_arg(*args, int);
	if (spec.qualifier == 'h')
		return spec.flags & SIGNED ? (u64)(s16)value : (u16)value;
	return spec.flags & SIGNED ? (u64)value : (u32)value;
}

/* One conversion; fmt stands behind the %. Returns where the text goes on. */
static const char *convert(struct out *out, const char *start, const char *fmt, va_list *args)
{
	struct spec spec = parse_spec(&fmt, args);
	unsigned int base = 10;
	const char *s;
	size_t room;
	char c;

	switch (*fmt) {
	case 'c':
		c = va_arg(*args, int);
		put_string(out, &c, 1, spec);
		return fmt + 1;
	case 's':
		s = va_arg(*args, const char *);
		s = s ? s : "(null)";
		room = out->last - out->at + 1; /* more than fits is as good as endless */
		put_string(out, s, strnlen(s, spec.precision < 0 ? room : min((size_t)spec.precision, room)), spec);
		return fmt + 1;
	case 'p':
		if (!(spec.flags & WIDTH)) {
			spec.width = 2 * sizeof(void *);
			spec.flags |= SPECIAL | LOWER | ZERO;
		}
		put_number(out, va_arg(*args, u64), 16, spec);
		return fmt + 1;
	case 'n':
		if (spec.qualifier == 'l')
			*va_arg(*args, long *) = out->at - start;
		else
			*va_arg(*args, int *) = out->at - start;
		return fmt + 1;
	case 'o': base = 8; break;
	case 'x': spec.flags |= LOWER; /* fallthrough */
	case 'X': base = 16; break;
	case 'd':
	case 'i': spec.flags |= SIGNED; break;
	case 'u': break;
	default: /* %% and what is no conversion: shown as it stands */
		put(out, '%');
		if (*fmt && *fmt != '%')
			put(out, *fmt);
		return *fmt ? fmt + 1 : fmt;
	}
	put_number(out, integer_arg(spec, args), base, spec);
	return fmt + 1;
}

int guest_vsnprintf(char *buf, int n, const char *fmt, va_list args)
{
	struct out out = { .at = buf, .last = buf + n - 1 };
	va_list rest;

	if (n <= 0) {
		GUEST_FAIL("no room for text: %d bytes", n);
		return 0;
	}
	va_copy(rest, args);
	while (*fmt && !out.full) {
		if (*fmt == '%')
			fmt = convert(&out, buf, fmt + 1, &rest);
		else
			put(&out, *fmt++);
	}
	va_end(rest);
	*out.at = '\0';
	if (out.full)
		GUEST_FAIL("the text does not fit in %d bytes", n);
	return out.at - buf;
}

int guest_snprintf(char *buf, int n, const char *fmt, ...)
{
	va_list args;
	int len;

	va_start(args, fmt);
	len = guest_vsnprintf(buf, n, fmt, args);
	va_end(args);
	return len;
}
