"""A real headless Chromium for tests of pages: nothing but this machine can be reached, and every complaint is kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright import sync_api

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOCAL = ("127.0.0.1", "localhost", "::1")
INLINE = ("file", "data", "blob", "about")


@dataclass
class Visit:
    """A page of the browser, what went wrong on it, and whom it asked for what.

    errors: messages of the console at level error, and exceptions that no script caught.
    requests: addresses that were asked for, on this machine. outside: the same elsewhere; these got no answer.
    """

    page: sync_api.Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def open(self, target: Path | str, wait_until: Any = "load", timeout_s: float = 30) -> None:
        """Go to a file or an address, and wait until it is loaded."""
        address = target.resolve().as_uri() if isinstance(target, Path) else target
        self.page.goto(address, wait_until=wait_until, timeout=1000 * timeout_s)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """What is seen now, or the `whole` page, as a PNG."""
        self.page.screenshot(path=path, full_page=whole)

    def broken_images(self) -> list[str]:
        """Beginnings of the addresses of images that show nothing; images further down are fetched too."""
        broken: list[str] = self.page.evaluate(
            """async () => {
                 const bad = [];
                 for (const image of document.images) {
                   image.loading = 'eager';
                   try { await image.decode(); } catch { bad.push(image.src.slice(0, 80)); continue; }
                   if (image.naturalWidth === 0) bad.push(image.src.slice(0, 80));
                 }
                 return bad;
               }"""
        )
        return broken

    def scrolls_sideways(self) -> bool:
        """Whether the page is wider than the window."""
        wider: bool = self.page.evaluate(
            "document.scrollingElement.scrollWidth > document.scrollingElement.clientWidth"
        )
        return wider


def chromium() -> str:
    """The browser's program. Raises AssertionError where there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    raise AssertionError(f"none of {', '.join(NAMES)} is on the PATH. Install one: apt-get install chromium")


@contextmanager
def page(width: int = 1400, height: int = 900, *, dark: bool = False, script: bool = True) -> Iterator[Visit]:
    """A fresh page in a window of `width` x `height` pixels, in the `dark` or light scheme, with or without scripts."""
    with (
        sync_api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]) as launched,
        launched.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            java_script_enabled=script,
            service_workers="block",
        ) as context,
    ):
        visit = Visit(context.new_page())
        visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
        visit.page.on("console", lambda message: visit.errors.append(message.text) if message.type == "error" else None)

        def decide(route: sync_api.Route) -> None:
            address = urlsplit(route.request.url)
            if address.scheme in INLINE or address.hostname in LOCAL:
                visit.requests.append(route.request.url)
                route.continue_()
            else:
                visit.outside.append(route.request.url)
                route.abort()

        context.route("**/*", decide)
        yield visit
