"""Every notebook: its style, that it runs from top to bottom, and that what is committed is what a run gives."""

from __future__ import annotations

import io
import os
import random
import re
import time
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import books
import pytest
from elftools.elf.elffile import ELFFile
from paths import GUESTS, REPO

import labkit as lk
from labkit.cli import freeze
from labkit.guest.compile import compile_guest

NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
TOUR, BITS, LAUNCH, FOUR, REAL_KVM = (
    REPO / "notebooks" / f"{name}.ipynb"
    for name in (
        "00_tour",
        "05_encryption_bits",
        "06_sev_launch",
        "07_four_architectures",
        "10_real_kvm",
    )
)
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
without_compiler = pytest.mark.parametrize(
    "path", (TOUR, BITS, LAUNCH, FOUR), ids=lambda path: path.stem
)  # all their guests come prebuilt

HOST = re.compile(r"\b0x7[0-9a-f]{11}\b")  # an address of host memory differs from run to run
ENTROPY = re.compile(r"\d\.\d\d bits a byte")  # of a page with such an address in it
NUMBERS = re.compile(
    r"\b(0x)?[0-9a-f]*\d[0-9a-f]*\b( \d{3})*"
)  # another compiler makes other steps and addresses
PLACES = re.compile(r"/(home|Users|root|tmp|work|usr|opt|mnt|var)/|site-packages|[A-Z]:\\\\")


@cache
def read(path: Path) -> Any:
    """The notebook as it is committed."""
    return books.read(path)


def cells(path: Path, kind: str) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def sections(path: Path) -> list[list[Any]]:
    """The cells from each ## heading to the next."""
    found: list[list[Any]] = []
    for cell in read(path).cells:
        if cell.source.startswith("## "):
            found.append([])
        if found:
            found[-1].append(cell)
    return found


def said(notebook: Any) -> list[list[str]]:
    """The plain text that each code cell shows."""
    return [
        [
            output.get("text", "") or output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


# --- style ---


def test_that_the_notebooks_are_there() -> None:
    assert {TOUR, BITS, LAUNCH, FOUR, REAL_KVM} <= set(NOTEBOOKS)


@each
def test_that_the_title_is_one_question(path: Path) -> None:
    titles = [
        line
        for cell in cells(path, "markdown")
        for line in cell.source.splitlines()
        if line.startswith("# ")
    ]
    assert len(titles) == 1 and titles[0].count("?") == 1 and titles[0].endswith("?")
    assert read(path).cells[0].source.startswith(titles[0])


@each
def test_that_it_has_20_to_45_cells_and_as_much_prose_as_code(path: Path) -> None:
    prose, code = cells(path, "markdown"), cells(path, "code")
    assert 20 <= len(prose) + len(code) <= 45
    assert sum(len(cell.source) for cell in prose) >= sum(len(cell.source) for cell in code)


@each
def test_that_code_cells_are_short(path: Path) -> None:
    lengths = [len(cell.source.splitlines()) for cell in cells(path, "code")]
    python = [
        len(cell.source.splitlines())
        for cell in cells(path, "code")
        if not cell.source.startswith("%%guest")
    ]
    assert max(lengths) <= 12 and sorted(python)[len(python) // 2] <= 3
    for cell in cells(path, "code"):
        assert not re.search(r"^def .*\n(?:[ \t]+.*\n){5}", cell.source, re.MULTILINE), (
            "a def of more than five lines"
        )


@each
def test_that_each_part_predicts_and_pins_its_lesson(path: Path) -> None:
    *parts, exercises = sections(path)
    for part in parts:
        text = "\n".join(cell.source for cell in part)
        assert "**Predict:**" in text and re.search(r"^assert ", text, re.MULTILINE), part[
            0
        ].source.splitlines()[0]
    text = "\n".join(cell.source for cell in exercises)
    assert text.count("<details><summary>Answer</summary>") == text.count("</details>") == 3
    assert len(re.findall(r"^seed = \d+$", text, re.MULTILINE)) == 3


@each
def test_that_a_commit_is_cited(path: Path) -> None:
    assert re.search(
        r"commit [0-9a-f]{12}\b", "\n".join(cell.source for cell in cells(path, "markdown"))
    )


@each
def test_that_it_is_frozen_with_its_outputs(path: Path) -> None:
    copy = deepcopy(read(path))
    assert freeze.freeze(copy) == []
    assert [cell.execution_count for cell in cells(path, "code")] == list(
        range(1, len(cells(path, "code")) + 1)
    )
    kinds = [output.output_type for cell in cells(path, "code") for output in cell.outputs]
    assert "error" not in kinds and kinds.count("execute_result") > len(kinds) // 2


@each
def test_that_a_committed_picture_has_a_text_and_comes_from_nowhere(path: Path) -> None:
    pages = [
        output.data["text/html"]
        for cell in cells(path, "code")
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    ]
    images = re.findall(r"<img[^>]*>", "".join(pages))
    assert images and all(
        re.search(r'src="data:image/', image) and re.search(r'alt="[^"]+"', image)
        for image in images
    )
    assert all(
        "text/plain" in output.data
        for cell in cells(path, "code")
        for output in cell.outputs
        if "data" in output
    )
    assert "http" not in "".join(pages)


@each
def test_that_no_machine_is_named(path: Path) -> None:
    found = PLACES.search(path.read_text(encoding="utf-8"))
    assert found is None, found


def test_that_host_addresses_and_numbers_are_recognised() -> None:
    assert HOST.sub("HVA", "hva 0x7f3a5c0408d0, gpa 0x408d0") == "hva HVA, gpa 0x408d0"
    assert NUMBERS.sub("N", "step 2 736 640, 400ff0 +20 lock bts") == "step N, N +N lock bts"


def guests(path: Path) -> list[str]:
    """The names of the guests that a notebook shows and compiles."""
    return [
        cell.source.split()[1] for cell in cells(path, "code") if cell.source.startswith("%%guest ")
    ]


# --- answers ---


def answer(letter: str, path: Path = TOUR) -> str:
    """The folded answer of an exercise."""
    [cell] = [cell for cell in cells(path, "markdown") if f"**{letter}. " in cell.source]
    return str(cell.source.partition("<details>")[2])


def shown(path: Path, letter: str, seed: int) -> str:
    """What the code cell of an exercise shows, in a copy of the notebook with another seed."""
    [at] = [at for at, cell in enumerate(read(path).cells) if f"**{letter}. " in cell.source]
    return said(ran(path, seed).notebook)[
        sum(cell.cell_type == "code" for cell in read(path).cells[:at])
    ][0]


def hello(**options: Any) -> Any:
    return lk.Vm.create(lk.Program.load(GUESTS / "hello.elf"), **options)


@pytest.mark.parametrize(("seed", "index"), [(1, "0x29"), (2, "0x14")])
def test_that_answer_a_is_right(seed: int, index: str) -> None:
    vm, slot = hello(), random.Random(seed).randrange(512)
    assert str(vm.page_table().walk(vm.pool.gva + 64 + 1096 * slot).steps[-1]) == f"PT[{index}]"
    assert re.search(rf"seed {seed}\D*{index}\b", answer("A"))


@pytest.mark.parametrize(("seed", "slot"), [(1, 1), (4, 3)])
def test_that_answer_b_is_right(seed: int, slot: int) -> None:
    vm = hello()
    vm.write(vm.pool.gva, random.Random(seed).getrandbits(512).to_bytes(64, "little"))
    assert vm.run().slot == slot and re.search(rf"seed {seed}\D*slot {slot}\b", answer("B"))


@pytest.mark.parametrize("seed", range(10))
def test_that_answer_c_is_right(seed: int) -> None:
    assert {uc.slot for uc in hello(nr_vcpus=4, schedule=f"random:{seed}:30").run_until_done()} == {
        0,
        1,
        2,
        3,
    }
    assert "Slots 0 to 3, whatever the seed" in answer("C")


@pytest.mark.parametrize("seed", [1, 2])
def test_that_answer_a_about_exits_is_right(seed: int, backend: str) -> None:
    [source] = [
        cell.source
        for cell in cells(REAL_KVM, "code")
        if cell.source.startswith("%%guest string\n")
    ]
    vm, count = (
        lk.Vm.create(lk.Program.compile(source.partition("\n")[2]), backend=backend),
        random.Random(seed).randrange(1, 33),
    )
    vm.write_guest_global("count", count)
    assert len([vm.run() for _ in range(40) if vm.vcpus[0].state != "done"]) == count + 1
    assert re.search(rf"seed {seed} it is {count} times", answer("A", REAL_KVM))


@pytest.mark.parametrize(("seed", "function"), [(1, "ucall"), (3, "ucall_alloc")])
def test_that_answer_b_about_steps_is_right(seed: int, function: str, backend: str) -> None:
    vcpu = hello(backend=backend, privilege="kernel").vcpus[0]
    vcpu.step(random.Random(seed).randrange(80))
    assert vcpu.where().partition("+")[
        0
    ] == function and f"seed {seed} it is <code>{function}</code>" in answer("B", REAL_KVM)


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("seed", range(3))
def test_that_answer_c_about_schedules_is_right(seed: int) -> None:
    program = lk.Program.load(GUESTS / "hello.elf")
    assert lk.compare(program, nr_vcpus=4, schedule=f"random:{seed}:30", max_insns=20_000).equal


@pytest.mark.parametrize(
    ("path", "letter", "seed", "told", "comes"),
    [
        (
            BITS,
            "A",
            1,
            "for seed 1 that is bit 46, 0x800040000000a003",
            "(46, '0x800000000000a003')",
        ),
        (BITS, "A", 2, "for seed 2 bit 51, 0x800800000000a003", "(51, '0x800000000000a003')"),
        (BITS, "B", 1, "the one at 0x440 for seed 1", "* 440 "),
        (BITS, "B", 2, "the one at 0x1c0 for seed 2", "* 1c0 "),
        (BITS, "C", 1, "For seed 1 (sev, stack) it is set", "('sev', 'stack', '0x8008"),
        (BITS, "C", 4, "for seed 4 (sev, pool) it is clear", "('sev', 'pool', '0x8000000"),
        (BITS, "C", 5, "for seed 5 (tdx, pool) it is set", "('tdx', 'pool', '0x80008"),
        (LAUNCH, "A", 1, "differ (seed 1: code", "('code', False)"),
        (LAUNCH, "A", 7, "seed 7: stack)", "('stack', False)"),
        (LAUNCH, "A", 5, "no measurement tells (seed 5)", "('pool', True)"),
        (LAUNCH, "B", 1, "For seed 1 it is <code>LAUNCH_UPDATE_VMSA", "LAUNCH_UPDATE_VMSA: ENOTTY"),
        (LAUNCH, "B", 2, "for seed 2 <code>GUEST_STATUS", "GUEST_STATUS (0, 8, "),
        (
            LAUNCH,
            "B",
            5,
            "for seed 5 <code>LAUNCH_FINISH",
            "LAUNCH_FINISH: EIO, the firmware says INVALID_GUEST_STATE (0x02)",
        ),
        (LAUNCH, "C", 1, "the digest is another", "(False, 'my secret is 2"),
        (FOUR, "A", 1, "For seed 1 (arm64, slot 137) it is L3[0x28]", "('arm64', 137, 'L3[0x28]')"),
        (FOUR, "A", 2, "for seed 2 (x86_64, slot 57) PT[0x14]", "('x86_64', 57, 'PT[0x14]')"),
        (FOUR, "B", 1, "For seed 1 that is 12 MiB, 0xc00000", "(12, '0xc00000', 'SYNC')"),
        (FOUR, "B", 2, "for seed 2 59 MiB, 0x3b00000", "(59, '0x3b00000', 'SYNC')"),
        (FOUR, "C", 1, "Seed 1 picks arm64", "('arm64', ['vCPU 0 is number 1 to"),
        (FOUR, "C", 2, "Never, whatever the seed", "is number 2 to"),
        (LAUNCH, "C", 5, "Seed 5 gives the old order", "(True, 'my secret is 2"),
    ],
)
def test_that_an_answer_is_what_its_cell_shows(
    path: Path, letter: str, seed: int, told: str, comes: str
) -> None:
    assert told in answer(letter, path) and comes in shown(path, letter, seed)


# --- running ---


@dataclass(frozen=True)
class Run:
    """A notebook after a run, and how long that took."""

    notebook: Any
    seconds: float


def run(path: Path, seed: int | None = None, **env: str) -> Run:
    """Run a copy of a notebook in a kernel of this Python that finds no program in PATH; raises when a cell fails."""
    from nbclient import NotebookClient  # nbformat comes with it: see books.py

    notebook = deepcopy(read(path))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if seed is not None:
                cell.source = re.sub(
                    r"^seed = \d+$", f"seed = {seed}", cell.source, flags=re.MULTILINE
                )
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,
    )
    start = time.monotonic()
    client.execute(env={**os.environ, "PATH": "", "PYTHONPATH": str(REPO), **env})
    return Run(notebook, time.monotonic() - start)


@cache
def ran(path: Path, seed: int | None = None) -> Run:
    """One run of a notebook, with its own seeds or another one, for all tests."""
    return run(path, seed)


@each
def test_that_it_runs_in_under_a_minute_with_ziglang_alone(path: Path) -> None:
    assert ran(path).seconds < 60


def compiled_alike() -> bool:
    """Whether the compiler here is the one that the committed guests, and so the committed outputs, were made with."""

    def producer(file: Any) -> object:
        return (
            next(ELFFile(file).get_dwarf_info().iter_CUs())
            .get_top_DIE()
            .attributes["DW_AT_producer"]
            .value
        )

    with (GUESTS / "hello.elf").open("rb") as kept:
        return producer(kept) == producer(
            io.BytesIO(compile_guest(GUESTS / "hello.c", compiler="zig").image)
        )


def is_settled(cell: Any) -> bool:
    """Whether a cell says the same on all machines, or on all that have /dev/kvm, and this one has it."""
    here = os.access("/dev/kvm", os.R_OK | os.W_OK)
    return "machine" not in cell.metadata.get("tags", ()) and (
        here or not cell.source.startswith("%%needs kvm")
    )


@each
def test_that_the_committed_text_is_what_a_run_gives(path: Path) -> None:
    loose, settled = not compiled_alike(), [is_settled(cell) for cell in cells(path, "code")]

    def same(texts: list[list[str]]) -> list[list[str]]:
        plain = [
            [ENTROPY.sub("some bits a byte", HOST.sub("HVA", text)) for text in cell]
            for cell in texts
        ]
        return [[NUMBERS.sub("N", text) for text in cell] for cell in plain] if loose else plain

    for index, (kept, now) in enumerate(
        zip(same(said(read(path))), same(said(ran(path).notebook)), strict=True)
    ):
        assert kept == now or not settled[index], (
            f"code cell {index + 1} is stale: labkit freeze --execute {path.relative_to(REPO)}"
        )


@without_compiler
def test_that_it_runs_without_any_compiler(path: Path, tmp_path: Path) -> None:
    (tmp_path / "ziglang").mkdir()
    (
        tmp_path / "ziglang" / "__init__.py"
    ).touch()  # found before the real one, and has no compiler in it
    done = run(path, PYTHONPATH=f"{tmp_path}:{REPO}")
    texts = "".join(text for cell in said(done.notebook) for text in cell)
    assert re.findall(r"No compiler here, so this is (\w+)\.elf", texts) == guests(path)


def test_that_a_notebook_about_kvm_says_why_it_cannot_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from labkit.engines.kvm import vm\nvm.DEVICE = '/nowhere/kvm'\n"
    )
    done = run(REAL_KVM, PYTHONPATH=f"{tmp_path}:{REPO}")
    needs = [cell for cell in done.notebook.cells if cell.source.startswith("%%needs kvm")]
    words = ["".join(output.get("text", "") for output in cell.outputs) for cell in needs]
    assert (
        words[0].startswith("Not run: there is no /nowhere/kvm: load kvm_intel") and len(words) > 10
    )
    assert set(words[1:]) == {"Not run, for the same reason: no kvm.\n"}
