"""A long run shows a line, a short one does not, and nothing is left of it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time

import books
import pytest

SPIN = """
import sys, threading, labkit as lk
from labkit.session import progress
spin = '#include "labkit.h"\\nvoid guest_code(uint64_t v) { volatile long i; for (;;) i++; }'
vm = lk.Vm.create(spin, name="spinner")
vcpu = vm.vcpus[0]
def stop_after(seconds):
    threading.Timer(seconds, vm.stop).start()
"""


def in_a_terminal(script: str, **env: str) -> str:
    """What a script writes to a terminal of 100 columns."""
    keeper, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
    done = subprocess.Popen(
        [sys.executable, "-c", SPIN + script],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=os.environ | env,
    )
    os.close(terminal)
    written = b""
    try:
        while part := os.read(keeper, 65536):
            written += part
    except OSError:  # how Linux says that nobody has the other end any longer
        pass
    os.close(keeper)
    assert done.wait(60) == 0, written.decode()
    return written.decode()


def lines(written: str) -> list[str]:
    """The lines of progress among what was written."""
    return [line for line in re.split(r"[\r\n]+", written) if "insns" in line]


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("vm.run()", "run"),
        ("vcpu.run()", "run"),
        ("next(vm.stream())", "stream"),
        ("vcpu.step_line(10**9)", "step_line"),
        ("[c.breakpoints for c in [vcpu] if c.run_to('guest_code')]", "run_to"),
    ],
)
def test_that_a_run_of_seconds_shows_a_line_from_one_second_on(call, what):
    written = in_a_terminal(f"stop_after(2)\ntry: {call}\nexcept lk.LabError: pass")
    found = lines(written)
    assert found and all(line.startswith(f"spinner: {what}: ") for line in found)
    assert 3 <= len(found) <= 15
    rate = re.search(r"\[00:0[12].*, +([\d.]+[kMG]) insns/s\]", found[-1])
    assert rate is not None
    assert not written.split("\r")[-1].strip(), "the last thing is that it is wiped out"


def test_that_with_a_budget_it_says_how_much_of_it_is_used():
    written = in_a_terminal("stop_after(2)\nvm.run(10**12)")
    assert re.search(r"spinner: run: +0%\|.*\| \d+M/1\.00T \[00:0", written)


def test_that_several_runs_have_a_line_each():
    written = in_a_terminal("for _ in range(2):\n    stop_after(1.5); vm.run(); print('between')")
    assert [part.strip() for part in written.split("\r") if "between" in part] == ["between"] * 2


@pytest.mark.parametrize(
    ("script", "env"),
    [
        ("stop_after(0.6); vm.run()", {}),
        ("stop_after(2); vm.run()", {"TQDM_DISABLE": "1"}),
        (
            "threading.Timer(2.5, vm.stop).start()\n"
            "other = threading.Thread(target=vm.run); other.start(); other.join()",
            {},
        ),
        ("vcpu.step(1000)", {}),
    ],
    ids=["short", "disabled", "another thread's", "stepping"],
)
def test_that_nothing_is_shown_for(script, env):
    assert not lines(in_a_terminal(script, **env))


def test_that_nothing_is_shown_where_nobody_sees_it():
    script = SPIN + "stop_after(2); vm.run(); print(len(progress.WATCH.lines))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_that_a_stderr_that_goes_away_ends_no_run():
    script = "sys.stderr.close(); stop_after(2); print(type(vm.run()).__name__)"
    assert "StopExit" in in_a_terminal(script)


def test_that_the_watching_thread_ends_with_the_last_vm():
    written = in_a_terminal(
        "import gc, time\ndel vm, vcpu, stop_after; gc.collect(); time.sleep(0.8)\n"
        "print('threads', threading.active_count())"
    )
    assert "threads 1" in written


def test_that_commands_with_many_results_show_a_line(monkeypatch, capsys):
    from labkit.cli import waiting

    monkeypatch.setattr(waiting, "is_shown", lambda: True)
    monkeypatch.setattr(waiting, "TICK", 0.02)
    monkeypatch.setattr(waiting, "LATE", 0.05)

    def slow():
        for index in range(3):
            time.sleep(0.1)
            yield index

    before = threading.active_count()
    assert list(waiting.told(slow(), "things")) == [0, 1, 2]
    assert threading.active_count() == before
    said = capsys.readouterr().err
    assert "things: 2 done [" in said


def test_that_nothing_of_it_is_left_in_a_notebook(monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    notebook = books.notebook(books.code(SPIN + "stop_after(2.5); vm.run()"))
    quiet = ["--IPKernelApp.log_level=ERROR"]
    client = NotebookClient(notebook, timeout=60, kernel_name="python3", extra_arguments=quiet)
    client.execute()
    shown, came = notebook.cells[0].outputs
    assert shown.data == {"text/plain": ""}
    assert came.data["text/plain"] == "StopExit()"
