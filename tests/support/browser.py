"""Pages in the machine's own Chromium. Whatever imports this is skipped where playwright is not installed."""

from __future__ import annotations

import shutil
from typing import Any, TypeVar

import pytest

pytest.importorskip(
    "playwright.sync_api",
    reason="playwright is not in this environment: pip install --no-deps --require-hashes -r requirements/browser.txt",
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
V = TypeVar("V", bound="Visit")
SCREENS = {"desk": (1280, 900), "phone": (390, 844)}
CONTRAST = 4.5  # of text, WCAG 2.2, criterion 1.4.3

READABLE = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = c => c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour[3] > 0) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    const box = element.getBoundingClientRect();
    if (!own || !box.width || element.matches(".skip, style")) continue;
    const style = getComputedStyle(element), drawn = element instanceof SVGElement;
    const [a, b] = [light(rgb(drawn ? style.fill : style.color)), light(paper(element))].sort((x, y) => y - x);
    const scale = drawn ? element.getScreenCTM().a : 1;
    const size = parseFloat(style.fontSize) * scale;
    found.push({text: element.textContent.trim().slice(0, 40), contrast: (a + 0.05) / (b + 0.05), size});
  }
  return found;
}
"""


class Visit:
    """A page that is open. `said` has the lines of its console, and the addresses it asked for beside its own."""

    def __init__(self, chromium: Any, url: str, screen: str = "desk", scheme: str = "light") -> None:
        width, height = SCREENS[screen]
        self.context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.url = url
        self.page.on("request", self.note)
        self.page.goto(url)

    def note(self, request: Any) -> None:
        """Take a request that the page makes."""
        if not request.url.startswith(self.url):
            self.said.append(request.url)

    def __enter__(self: V) -> V:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()
