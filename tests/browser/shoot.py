"""Photographs of every view with headless Chromium, for people to look at: python tests/browser/shoot.py DIR [WIDTH ...]."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import encryption_sample as secrets  # noqa: E402
import views_sample as sample  # noqa: E402

from labkit.views import dashboard, encryption, eyes, launch, memory, pages, pool, stepper  # noqa: E402
from labkit.views.show import View  # noqa: E402

ACTIONS = ("step", "step_line", "run")


def views(width: int) -> dict[str, View]:
    """Every view of the sample run."""
    before, now = sample.vm(late=False), sample.vm()
    gva = now.selection.gva if now.selection else 0
    objects = pages.pool_objects(now.pool, now.page_table.walk(gva), 2)
    big = sample.pool(4096)
    return {
        "vm": dashboard.render(now, before, width=width, actions=ACTIONS),
        "sev": dashboard.render(
            sample.vm(51),
            sample.vm(51, late=False),
            width=width,
            actions=(*ACTIONS, "home", "back", "end"),
        ),
        "pool": pool.render(sample.pool(), width=width, selection=sample.selection()),
        "pool4096": pool.render(big, width=width),
        "walk": pages.render(
            now.page_table,
            before.page_table,
            width=width,
            gva=gva,
            objects=objects,
            pinned=0x40126C,
        ),
        "hole": pages.render(now.page_table, width=width, gva=0x201234),
        "walksev": pages.render(
            sample.page_table(51, True),
            sample.page_table(51),
            width=width,
            gva=gva,
            objects=objects,
            pinned=0x40126C,
        ),
        "stepper": stepper.render(sample.vcpu(), width=width),
        "memory": memory.render(sample.memory(), width=width),
        "encryption": encryption.render(secrets.encryption(), width=width),
        "snp": encryption.render(secrets.snp(), width=width),
        "protected": dashboard.render(
            sample.vm(**secrets.vm_facts()), width=width, actions=ACTIONS
        ),
        "eyes": eyes.render(secrets.eyes(), width=width),
        "launch": launch.render(secrets.launch(), width=width),
    }


def shoot(page: str, to: Path, width: int, height: int) -> None:
    """One page as a PNG."""
    source = to.with_suffix(".html")
    source.write_text(page, encoding="utf-8")
    subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--screenshot={to}",
            f"--window-size={width},{height}",
            source.as_uri(),
        ],
        check=True,
        capture_output=True,
    )


def main() -> None:
    """Both themes, and the static form, at every width."""
    out, widths = Path(sys.argv[1]), [int(arg) for arg in sys.argv[2:]] or [620, 940, 1400]
    out.mkdir(parents=True, exist_ok=True)
    for width in widths:
        drawn = views(width - 40)
        for theme in ("light", "dark"):
            body = "".join(
                f"<p style='font:11px monospace;color:#888'>{name}</p>{view.html}"
                for name, view in drawn.items()
            )
            page = next(iter(drawn.values())).page(theme)
            start, end = page.index("<section"), page.index("</body>")
            shoot(
                page[:start] + body + page[end:],
                out / f"{theme}-{width}.png",
                width,
                7600 if width > 700 else 10400,
            )
        still = "<body style='background:#111;margin:20px'>" + "".join(
            f"<p>{view.img_html}" for view in drawn.values()
        )
        shoot(
            "<!doctype html><meta charset=utf-8>" + still, out / f"static-{width}.png", width, 7600
        )


if __name__ == "__main__":
    main()
