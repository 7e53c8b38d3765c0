"""A headless browser: what a page looks like at a width, as a picture and in numbers."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000")
# Sizes in CSS pixels: what sticks out to the right, and the smallest letters, of the table and of the figures.
LOOK = """<script>addEventListener("load", () => {
  const all = selector => [...document.querySelectorAll(selector)].filter(e => e.getClientRects().length);
  const height = e => e.getBoundingClientRect().height;
  document.body.dataset.look = JSON.stringify({
    width: innerWidth, content: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    cells: all("td").length, letters: Math.min(...all("td, dd").map(e => parseFloat(getComputedStyle(e).fontSize))),
    svg_letters: Math.min(...all("svg text").map(height)), out: all("td, figure, svg text").filter(e => {
      const r = e.getBoundingClientRect(); return r.right > innerWidth + 1 || r.left < -1 }).map(e => e.textContent),
  })
})</script>"""


def find() -> str:
    for name in NAMES:
        if found := shutil.which(name):
            return found
    return pytest.skip(f"no browser: none of {', '.join(NAMES)} (Debian: apt-get install chromium-headless-shell)")


def call(page: Path, width: int, *flags: str) -> str:
    size = f"--window-size={width},4000"
    command = [find(), *FLAGS, size, f"--user-data-dir={page.parent / 'profile'}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def look(page: Path, width: int) -> dict:
    """The numbers of LOOK."""
    copy = page.with_name("looked_at.html")
    copy.write_text(page.read_text().replace("</head>", f"{LOOK}</head>"))
    found = re.search(r'data-look="([^"]+)"', call(copy, width, "--dump-dom"))
    assert found, "the page has not loaded"
    return json.loads(unescape(found[1]))


def screenshot(page: Path, width: int, picture: Path) -> None:
    call(page, width, f"--screenshot={picture}")
