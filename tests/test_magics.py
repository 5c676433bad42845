"""%%guest: a cell of C becomes a Program, or the compiler's message with the cell's line."""

from __future__ import annotations

import pytest
from IPython.core.interactiveshell import InteractiveShell
from paths import GUESTS

from labkit.guest.program import Program

GOOD = '#include "labkit.h"\nvoid guest_code(uint64_t vcpu)\n{\n\tGUEST_DONE();\n}\n'


@pytest.fixture
def shell():
    InteractiveShell.clear_instance()
    ipython = InteractiveShell.instance(colors="nocolor")
    ipython.run_line_magic("load_ext", "labkit.magics")
    yield ipython
    InteractiveShell.clear_instance()


def test_that_a_cell_becomes_a_program_with_the_cells_own_lines(shell):
    result = shell.run_cell(f"%%guest hello\n{GOOD}")
    program = shell.user_ns["hello"]
    assert result.success and result.result is program and isinstance(program, Program)
    line = program.line_at(program.gva_of_line("hello.c", 5)[0])
    assert (line.file, line.line, line.text) == ("hello.c", 5, "\tGUEST_DONE();")


def test_that_a_compile_error_is_the_compilers_message_with_the_cells_line(shell, capsys):
    shell.user_ns["old"] = "kept"
    result = shell.run_cell("%%guest old\n\nvoid guest_code(void) { nonsense; }\n")
    shown = "".join(capsys.readouterr())
    assert not result.success
    assert "old.c:3:" in shown and "nonsense" in shown and "Traceback" not in shown
    assert shell.user_ns["old"] == "kept"


def test_that_warnings_are_shown_and_the_program_is_made(shell, capsys):
    assert shell.run_cell("%%guest warned\nvoid guest_code(void) { int unused; }\n").success
    assert "warned.c:2:" in capsys.readouterr().out and "warned" in shell.user_ns


def test_that_options_are_taken(shell):
    assert shell.run_cell(f"%%guest fast --opt=-O2 --compiler zig --arch x86_64\n{GOOD}").success
    assert shell.run_cell(f"%%guest slow --opt=-O0\n{GOOD}").success
    assert shell.user_ns["fast"].image != shell.user_ns["slow"].image
    assert shell.run_cell(f"%%guest old -DLABKIT_UCALL_ON_STACK -D X=1\n{GOOD}").success
    assert "ucall_is_on_stack" in shell.user_ns["old"].symbols
    assert "ucall_is_on_stack" not in shell.user_ns["fast"].symbols


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "required: name"),
        ("not-a-name", "cannot be the name of a variable"),
        ("class", "cannot be the name"),
        ("x --nonsense", "--nonsense"),
        ("x --arch mips", "mips"),
        ("x 'open", "quotation"),
        ("x --compiler tcc", "tcc"),
    ],
)
def test_that_a_wrong_line_is_refused_in_words(shell, capsys, line, words):
    assert not shell.run_cell(f"%%guest {line}\n{GOOD}").success
    shown = "".join(capsys.readouterr())
    assert words in shown and "Traceback" not in shown


def test_that_a_backslash_in_the_line_does_not_swallow_the_cell(shell):
    result = shell.run_cell(f"%%guest x \\\n{GOOD}")
    assert not result.success or shell.user_ns["x"].symbol("guest_code")


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    # found before the real one, and has no compiler in it
    (tmp_path / "ziglang").mkdir()
    (tmp_path / "ziglang" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", "")


@pytest.mark.parametrize(
    ("line", "change", "made"),
    [
        ("hello", "", True),
        ("hello", "x", False),
        ("hello --opt=-O2", "", False),
        ("leak", "", False),
        ("hello -DLABKIT_X", "", False),
        ("stack -DLABKIT_UCALL_ON_STACK", "", True),
        ("stack", "", False),
        ("stack -DLABKIT_UCALL_ON_STACK -DX", "", False),
    ],
)
def test_that_without_a_compiler_only_the_very_guest_that_comes_along_will_do(
    shell, capsys, no_compiler, line, change, made
):
    source = (GUESTS / "hello.c").read_text().partition("\n")[2]
    assert shell.run_cell(f"%%guest {line}\n{source}{change}").success is made
    shown = "".join(capsys.readouterr())
    name = line.split()[0]
    said = f"No compiler here, so this is {name}.elf" if made else "pip install ziglang"
    assert said in shown
    assert (name in shell.user_ns) is made


def test_that_a_cell_for_an_engine_that_is_there_runs_as_any_other(shell):
    assert shell.run_cell("%%needs unicorn\nx = 1\nx + 1").result == 2
    assert not shell.run_cell("%%needs unicorn\n1 / 0").success


def test_that_a_cell_for_an_engine_that_is_not_there_says_why_once(shell, capsys):
    shell.run_line_magic("reload_ext", "labkit.magics")
    first = "%%needs bochs\nx = 0", "Not run: backend 'bochs' is not part of this labkit"
    second = "%%needs bochs\nx = 1", "Not run, for the same reason: no bochs."
    for cell, words in (first, second, first, second):
        assert shell.run_cell(cell).success and words in capsys.readouterr().out
    assert "x" not in shell.user_ns
