"""Photographs of every view with headless Chromium, for people to look at.

python tests/browser/shoot.py DIR [WIDTH ...]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import encryption_sample as secrets  # noqa: E402
import views_sample as sample  # noqa: E402

from labkit.views import dashboard, encryption, eyes, launch, memory, pages, pool, stepper  # noqa: E402
from labkit.views.show import View  # noqa: E402

WIDTHS = [620, 940, 1400]
MARGIN = 40  # pixels of a page around a view
ACTIONS = ("step", "step_line", "run")
MORE_ACTIONS = (*ACTIONS, "home", "back", "end")
PINNED = 0x40126C


def views(width: int) -> dict[str, View]:
    """Every view of the sample run."""
    before, now = sample.vm(late=False), sample.vm()
    was_secret, is_secret = sample.vm(51, late=False), sample.vm(51)
    protected = sample.vm(**secrets.vm_facts())
    return {
        "vm": dashboard.render(now, before, width=width, actions=ACTIONS),
        "sev": dashboard.render(is_secret, was_secret, width=width, actions=MORE_ACTIONS),
        "pool": pool.render(sample.pool(), width=width, selection=sample.selection()),
        "pool4096": pool.render(sample.pool(4096), width=width),
        "hole": pages.render(now.page_table, width=width, gva=0x201234),
        "stepper": stepper.render(sample.vcpu(), width=width),
        "memory": memory.render(sample.memory(), width=width),
        "encryption": encryption.render(secrets.encryption(), width=width),
        "snp": encryption.render(secrets.snp(), width=width),
        "protected": dashboard.render(protected, width=width, actions=ACTIONS),
        "eyes": eyes.render(secrets.eyes(), width=width),
        "launch": launch.render(secrets.launch(), width=width),
        **walks(width),
    }


def walks(width: int) -> dict[str, View]:
    """The walk of slot 2 with what changed, in plain page tables and in those with a C-bit."""
    out = {}
    for name, c_bit in (("walk", None), ("walksev", 51)):
        before, now = sample.page_table(c_bit), sample.page_table(c_bit, late=True)
        gva = sample.selection().gva
        assert gva is not None
        objects = pages.pool_objects(sample.pool(), now.walk(gva), 2)
        out[name] = pages.render(now, before, width=width, gva=gva, objects=objects, pinned=PINNED)
    return out


def shoot(page: str, to: Path, width: int, height: int) -> None:
    """One page as a PNG."""
    source = to.with_suffix(".html")
    source.write_text(page, encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--screenshot={to}", f"--window-size={width},{height}", source.as_uri()]
    subprocess.run(command, check=True, capture_output=True)


def live_page(drawn: dict[str, View], theme: str) -> str:
    """All views below each other on a page of a theme."""
    body = ""
    for name, view in drawn.items():
        body += f"<p style='font:11px monospace;color:#888'>{name}</p>{view.html}"
    page = drawn["vm"].page(theme)
    start, end = page.index("<section"), page.index("</body>")
    return page[:start] + body + page[end:]


def static_page(drawn: dict[str, View]) -> str:
    """The form that needs no style sheet, on a dark page of somebody else's."""
    body = "".join(f"<p>{view.img_html}" for view in drawn.values())
    return f"<!doctype html><meta charset=utf-8><body style='background:#111;margin:20px'>{body}"


def main() -> None:
    """Both themes, and the static form, at every width."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for width in [int(arg) for arg in sys.argv[2:]] or WIDTHS:
        drawn = views(width - MARGIN)
        height = 7600 if width > 700 else 10400
        for theme in ("light", "dark"):
            shoot(live_page(drawn, theme), out / f"{theme}-{width}.png", width, height)
        shoot(static_page(drawn), out / f"static-{width}.png", width, 7600)


if __name__ == "__main__":
    main()
