#!/bin/sh
# Builds peer.c against the kernel's selftest library in DIR (what build.sh prints) and writes the program to OUTPUT.
#   peer.sh DIR OUTPUT
set -eu
here=$(cd "$(dirname "$0")" && pwd -P)
kvm=$1 tools=$1/../../.. output=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/linux" "$work/asm"               # of the kernel's own headers only these: the others are the machine's
ln -s "$tools/include/uapi/linux/kvm.h" "$work/linux/"
ln -s "$tools/arch/x86/include/uapi/asm/kvm.h" "$work/asm/"
gcc -march=x86-64-v2 -O2 -w -std=gnu99 -D_GNU_SOURCE -fno-builtin -fno-tree-loop-distribute-patterns -fno-stack-protector -fno-PIE \
	-fno-strict-aliasing -I"$work" -I"$tools/include" -I"$tools/arch/x86/include" -I"$kvm/include" -I"$kvm/include/x86_64" \
	-I"$kvm/../rseq" -I"$kvm/.." -no-pie -pthread -o "$output" \
	"$here/peer.c" "$kvm"/lib/*.c "$kvm"/lib/x86_64/*.c "$kvm/lib/x86_64/handlers.S"
