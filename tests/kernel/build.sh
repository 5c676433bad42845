#!/bin/sh
# Builds the KVM selftests of Linux 6.12 from Debian's package linux-source-6.12 and prints, as the last line of
# standard output, the directory that holds the binaries (guest_print_test, x86_64/sev_smoke_test, ...).
# With an argument, arm64, riscv or s390, guest_print_test alone is built, with Debian's cross compiler.
#
# They are built once, outside the repository: in $LABKIT_SELFTESTS, or ${XDG_CACHE_HOME:-~/.cache}/labkit-tests/selftests-6.12.
# Exit status 3 says that this machine lacks what the build needs (the reason is on standard error), 1 that the build failed.
set -eu
umask 022

tarball=${LABKIT_LINUX_SOURCE:-/usr/src/linux-source-6.12.tar.xz}
arch=${1:-x86}
case $arch in
x86) cross='' want='' ;;
arm64) cross=aarch64-linux-gnu- want=gcc-aarch64-linux-gnu\ libc6-dev-arm64-cross ;;
riscv) cross=riscv64-linux-gnu- want=gcc-riscv64-linux-gnu\ libc6-dev-riscv64-cross ;;
s390) cross=s390x-linux-gnu- want=gcc-s390x-linux-gnu\ libc6-dev-s390x-cross ;;
*) echo "build.sh: no architecture $arch" >&2; exit 2 ;;
esac
cache=${LABKIT_SELFTESTS:-${XDG_CACHE_HOME:-$HOME/.cache}/labkit-tests/selftests-6.12}
[ "$arch" = x86 ] || cache=$cache-$arch
log=$cache.log
kvm=tools/testing/selftests/kvm

# What the KVM selftests and their uapi headers are made from; the rest of the kernel stays in the tarball.
parts="Makefile scripts usr/include include/uapi include/asm-generic tools/arch tools/build tools/include tools/lib/rbtree.c tools/scripts tools/testing/selftests/lib.mk
tools/testing/selftests/kselftest.h tools/testing/selftests/kselftest_harness.h tools/testing/selftests/rseq $kvm"

case $arch in
x86) parts="$parts arch/x86/Makefile arch/x86/entry/syscalls arch/x86/include/uapi arch/x86/include/asm arch/x86/tools" ;;
*) parts="$parts arch/$arch" ;;
esac

missing() { echo "build.sh: $1" >&2; exit 3; }
[ "$(uname -m)" = x86_64 ] || missing "the kernel selftests are built on x86_64 only, this is $(uname -m)"
for tool in ${cross}gcc make tar xz flock; do
	command -v "$tool" >/dev/null || missing "no $tool (Debian: apt-get install ${want:-build-essential} xz-utils util-linux)"
done

mkdir -p "$(dirname "$cache")"
cache=$(cd "$(dirname "$cache")" && pwd -P)/$(basename "$cache")
exec 9>"$cache.lock"
flock 9                                       # two test runs at once: the second one waits and finds the work done

[ -r "$tarball" ] || [ -f "$cache/stamp" ] || missing "no $tarball (Debian: apt-get install linux-source-6.12)"
stamp="$(cksum <"$0") $(stat -Lc '%s %Y' "$tarball" 2>/dev/null || :)"
if [ -f "$cache/stamp" ] && { [ ! -r "$tarball" ] || [ "$(cat "$cache/stamp")" = "$stamp" ]; }; then
	echo "$cache/$kvm"
	exit 0
fi

if [ -e "$cache" ] && [ ! -f "$cache/stamp" ]; then
	echo "build.sh: $cache exists and is not this script's work: it will not be replaced" >&2
	exit 1
fi

tmp=$cache.tmp.$$
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
mkdir "$tmp"
jobs=$(nproc)
unset MAKEFLAGS MFLAGS MAKELEVEL ARCH CROSS_COMPILE CFLAGS CPPFLAGS LDFLAGS KBUILD_OUTPUT OUTPUT O || :

build() {
	echo "== unpack $tarball"
	# shellcheck disable=SC2086 # the parts are words
	tar -I 'xz -T0' -xf "$tarball" -C "$tmp" --strip-components=1 $(printf 'linux-source-6.12/%s ' $parts)
	echo "== uapi headers"
	make -C "$tmp" -j"$jobs" headers ARCH="$arch" CROSS_COMPILE="$cross"
	echo "== selftests"                       # the debug info names the sources where they will be, not where they are now
	if [ "$arch" = x86 ]; then
		make -C "$tmp/$kvm" -k -j"$jobs" EXTRA_CFLAGS="-ffile-prefix-map=$tmp=$cache" || echo "== some did not build"
	else
		make -C "$tmp/$kvm" -j"$jobs" ARCH="$arch" CROSS_COMPILE="$cross" EXTRA_CFLAGS="-ffile-prefix-map=$tmp=$cache" \
			"$tmp/$kvm/guest_print_test"
	fi
	test -x "$tmp/$kvm/guest_print_test"
	echo "== keep the binaries and what their line tables name"
	find "$tmp/$kvm" \( -name '*.o' -o -name '*.d' \) -delete
	find "$tmp" -mindepth 1 -maxdepth 1 ! -name tools -exec rm -rf {} +
	echo "$stamp" >"$tmp/stamp"
}

echo "build.sh: building the KVM selftests of Linux 6.12, about half a minute (log: $log)" >&2
set +e                                        # a function called in a condition would lose its `set -e`
(set -e; build) >"$log" 2>&1 </dev/null
status=$?
set -e
if [ "$status" -ne 0 ]; then
	echo "build.sh: the build failed; $log ends with:" >&2
	tail -n 15 "$log" >&2
	exit 1
fi
rm -rf "$cache"
mv "$tmp" "$cache"
echo "$cache/$kvm"
