"""Links of the documentation lead somewhere, and its index has every decision."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from test.hygiene import lint

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
MARKS = re.compile(r"[^\w\- ]")


def pages() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=lint.ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [page for name in listed.stdout.split() if (page := lint.ROOT / name).is_file()]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = FENCED.sub("", page.read_text())
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {MARKS.sub("", head).strip().lower().replace(" ", "-") for head in heads}


def broken(page: Path) -> list[str]:
    found = []
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        headless = anchor and target.suffix == ".md" and anchor not in anchors(target)
        if not target.exists() or headless:
            found.append(link)
    return found


def test_links_lead_somewhere() -> None:
    found = {str(page.relative_to(lint.ROOT)): links for page in pages() if (links := broken(page))}
    assert not found


def test_the_index_has_every_decision() -> None:
    index = (lint.ROOT / "docs" / "README.md").read_text()
    decisions = [path.name for path in (lint.ROOT / "docs" / "adr").glob("*.md")]
    assert [name for name in decisions if f"(adr/{name})" not in index] == []


def test_broken_links_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c\n[a](#a-b-c) [b](page.md#none) [c](gone.md) [d](https://x.y)\n")
    assert broken(page) == ["page.md#none", "gone.md"]
