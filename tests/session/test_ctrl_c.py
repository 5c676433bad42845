"""Ctrl-C at any moment: the guest stops at once, and goes on later as if nothing had been. In a process of its own, with a watchdog."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from paths import REPO

HEAD = """
import faulthandler, json, os, signal, threading, time
faulthandler.dump_traceback_later(250, exit=True)
import labkit as lk
program = lk.Program.compile(arch=ARCH, source_or_path='''
#include "labkit.h"
static uint64_t words[512];
static noinline uint64_t fib(uint64_t n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
void guest_memory(uint64_t n)
{
	uint64_t sum = n;
	for (uint64_t i = 0; i < n; i++) {
		words[i & 511] ^= sum;
		sum = sum * 25214903917 + words[i * 7 & 511];
	}
	GUEST_SYNC(sum);
}
void guest_calls(uint64_t n) { GUEST_SYNC(fib(n)); }
/* A load into the register that it has its address from: run twice it is another one. */
void guest_chase(uint64_t n)
{
	uint64_t *at = words;
	for (uint64_t i = 0; i < 512; i++)
		words[i] = (uint64_t)&words[i * 5 + 3 & 511];
	while (n--)
		asm volatile("" : "+r"(at) : "r"(at = (uint64_t *)*at) : "memory");
	GUEST_SYNC(at - words);
}
void guest_atomics(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		__atomic_fetch_add(&words[i & 3], i, __ATOMIC_SEQ_CST);
	GUEST_SYNC(words[0] ^ words[1] ^ words[2] ^ words[3]);
}
void guest_nested(uint64_t n)
{
	uint64_t sum = n;
	for (uint64_t i = 0; i < n; i++) {
		for (uint64_t j = 0; j < 200000; j++)
			words[j & 255] += sum ^ j;
		for (uint64_t j = 0; j < 100000; j++)
			asm volatile("" : "+r"(sum));
		sum += words[i & 255]--;
	}
	GUEST_SYNC(sum);
}
static noinline uint64_t odd(uint64_t i) { return i & 1 ? i * 3 : words[i & 511]; }
void guest_branches(uint64_t n)
{
	static uint64_t (*volatile call)(uint64_t) = odd;
	uint64_t sum = 0;
	for (uint64_t i = 0; i < n; i++)
		sum += i % 3 ? call(i) : sum >> 7;
	GUEST_SYNC(sum);
}
#ifdef __x86_64__
void guest_registers(uint64_t n)
{
	uint64_t sum = 0;
	while (n--)
		asm volatile("lea 3(%0,%0,2), %0" : "+r"(sum));
	GUEST_SYNC(sum);
}
void guest_copies(uint64_t n)
{
	uint64_t total = 0;
	while (n--) {
		uint64_t count = 512, from = (uint64_t)words, to = from;
		asm volatile("rep movsq" : "+c"(count), "+S"(from), "+D"(to) : : "memory");
		total += count + to - (uint64_t)words;
	}
	GUEST_SYNC(total);
}
void guest_jumps(uint64_t n)
{
	uint64_t sum = 0;
	asm volatile("lea 2f(%%rip), %%rax; lea 1f(%%rip), %%rcx; 1: add $3, %1; test $8, %1; jz 3f; incq words(%%rip);"
		"3: jmp *%%rax; 2: dec %0; jz 4f; jmp *%%rcx; 4:" : "+r"(n), "+r"(sum) : : "rax", "rcx", "memory");
	GUEST_SYNC(sum + words[0]);
}
/* Both blocks are reached forwards before they make a loop of indirect jumps. */
void guest_hops(uint64_t n)
{
	uint64_t sum = 0;
	asm volatile("lea 1f(%%rip), %%rax; lea 2f(%%rip), %%rcx; jmp 1f; 1: add $3, %1; xor %1, words(%%rip); jmp *%%rcx;"
		"2: dec %0; jz 4f; jmp *%%rax; 4:" : "+r"(n), "+r"(sum) : : "rax", "rcx", "memory");
	GUEST_SYNC(sum + words[0]);
}
#endif
void guest_spins(void) { for (;;) asm volatile(""); }
void guest_pauses(void) { for (;;) cpu_relax(); }
''')
armed, over = threading.Event(), threading.Event()
def shoot():  # one Ctrl-C each time that somebody is ready for it: none may come where the last one is still being dealt with
    while not over.is_set():
        if armed.wait(1) and not over.wait(min(0.02, whole / 10)):
            armed.clear()
            os.kill(os.getpid(), signal.SIGINT)
"""
MANY = (
    HEAD
    + """
def vcpu():
    vm = lk.Vm.create(program, ENTRY)
    vm.vcpus[0].args_set(COUNT)
    return vm.vcpus[0]
cpu = vcpu()
whole = time.monotonic()
truth = cpu.run()
whole = time.monotonic() - whole  # seconds that it takes when nobody disturbs it
cpu, hits, came = vcpu(), 0, None
thread = threading.Thread(target=shoot, daemon=True)
thread.start()
while came is None:
    try:
        armed.set()
        came = cpu.run()
        over.set()
        thread.join()
        time.sleep(0.01)
    except KeyboardInterrupt:
        hits += 1
        came = next((e for e in cpu.vm.log.entries if getattr(e, "cmd", "") == "SYNC"), None)  # it may come just behind the exit
over.set()
print(json.dumps([hits, list(came.args) == list(truth.args)]))
"""
)
ONCE = (
    HEAD
    + """
vm = lk.Vm.create(program, ENTRY)
threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
begin = time.monotonic()
try:
    vm.run(COUNT)
except KeyboardInterrupt:
    print(json.dumps([time.monotonic() - begin, vm.vcpus[0].where(), vm.vcpus[0].step() is None, len(vm.page_table())]))
"""
)


def result(code: str, entry: str, count: int | None, arch: str = "x86_64") -> list[object]:
    code = f"ENTRY, COUNT, ARCH = {entry!r}, {count}, {arch!r}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer: list[object] = json.loads(done.stdout)
    return answer


PLAIN = {
    "guest_memory": 20_000_000,
    "guest_chase": 60_000_000,
    "guest_calls": 33,
    "guest_branches": 10_000_000,
    "guest_atomics": 15_000_000,
    "guest_nested": 280,
}
X86 = {
    "guest_registers": 200_000_000,
    "guest_copies": 100_000,
    "guest_jumps": 20_000_000,
    "guest_hops": 20_000_000,
}
SLOWER = {"x86_64": 1, "arm64": 1, "riscv64": 1, "s390x": 3}  # Unicorn is


RUNS = [("x86_64", *of) for of in X86.items()] + [
    (arch, entry, n - slower // 3 if entry == "guest_calls" else n // slower)
    for arch, slower in SLOWER.items()
    for entry, n in PLAIN.items()
]


@pytest.mark.parametrize(("arch", "entry", "n"), RUNS)
def test_that_a_guest_disturbed_many_times_computes_the_same(arch: str, entry: str, n: int) -> None:
    hits, same = result(MANY, entry, n, arch)
    assert isinstance(hits, int) and hits >= 3 and same


@pytest.mark.parametrize("entry", ["guest_spins", "guest_pauses"])
@pytest.mark.parametrize("budget", [None, 10**12])
def test_that_a_guest_that_never_ends_stops_at_once_and_can_be_looked_at(
    entry: str, budget: int | None
) -> None:
    seconds, where, steps, leaves = result(ONCE, entry, budget)
    assert (
        isinstance(seconds, float)
        and seconds < 20
        and str(where).startswith(entry)
        and steps
        and leaves
    )


FINALIZER = """
import faulthandler, os, signal, time
faulthandler.dump_traceback_later(250, exit=True)
import labkit as lk
vm = lk.Vm.create(lk.Program.load("data/guests/hello.elf"))
vm.run()
class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            pass
try:
    Late()
    time.sleep(100)
except KeyboardInterrupt:
    print("raised", vm.run().cmd)
"""


def test_that_ctrl_c_in_a_finalizer_is_raised_behind_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FINALIZER],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPO,
    )
    assert done.stdout.startswith("raised ") and not done.stderr
