"""Look at the built site in headless Chromium: pages at desktop and phone width, and the search.

    python tools/see_site.py [docs/_build] [--pictures folder]

Fails where a page logs an error, is wider than its window, has a picture that does not load, or where
the search does not find what it should. Needs selenium, and Chromium with its driver; without them it
says so, and exits with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import importlib.util
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGES = {
    "landing": "index.html",
    "gallery": "why/index.html",
    "gallery page": "why/drifting_bias.html",
    "figures": "performance.html",
    "benchmarks": "benchmarks.html",
    "audit": "audit.html",
}
WIDTHS = {"desktop": (1400, 1000), "phone": (390, 844)}
SEARCHES = {"running variance": "Conventions"}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, and keeps no log."""

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a folder's files are served."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextlib.contextmanager
def browser(chromium: str, driver: str) -> Iterator[Any]:
    """A headless Chromium that keeps what pages log."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as window:
        yield window


def wrong_on(window: Any, width: int) -> Iterator[str]:
    """What is wrong on the page that is shown."""
    for entry in window.get_log("browser"):
        if entry["level"] in ("SEVERE", "WARNING"):
            yield f"logs {entry['message']}"
    wide = window.execute_script("return document.documentElement.scrollWidth")
    if wide > width:
        yield f"is {wide} pixels wide in a window of {width}"
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
    for image in window.execute_script(broken):
        yield f"lacks the picture {image}"
    if len(window.execute_script("return document.body.innerText")) < 200:
        yield "is all but empty"


def look(window: Any, address: str, pictures: Path | None) -> Iterator[str]:
    """Show each page at each width, and search; give what is wrong."""
    for device, (width, height) in WIDTHS.items():
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": device == "phone"}
        window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for name, path in PAGES.items():
            window.get(f"{address}/{path}")
            time.sleep(2)  # pages draw by scripts
            problems = list(wrong_on(window, width))
            print(f"{device:8}{name:14}{'; '.join(problems) or 'right'}")
            yield from problems
            if pictures is not None:
                window.save_screenshot(str(pictures / f"{device}-{name.replace(' ', '-')}.png"))
        for words, expected in SEARCHES.items():
            window.get(f"{address}/search.html?q={words.replace(' ', '+')}")
            titles: list[str] = []
            for _ in range(50):
                script = (
                    "return [...document.querySelectorAll('#search-results li a')].map(a => a.innerText)"
                )
                titles = window.execute_script(script)
                if any(expected in title for title in titles):
                    break
                time.sleep(0.2)
            found = any(expected in title for title in titles)
            print(f"{device:8}search for {words!r}: {', '.join(titles[:8])}")
            if not found:
                yield f"the search for {words!r} does not find {expected!r}"
            yield from wrong_on(window, width)
            if pictures is not None:
                window.save_screenshot(str(pictures / f"{device}-search.png"))


def main() -> int:
    """Look at all pages; the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("site", type=Path, nargs="?", default=Path("docs/_build"))
    parser.add_argument("--pictures", type=Path, help="a folder for screenshots")
    chosen = parser.parse_args()
    if not (chosen.site / "index.html").is_file():
        parser.error(f"site: got {chosen.site}, expected a folder that sphinx-build has written")
    if chosen.pictures is not None:
        chosen.pictures.mkdir(parents=True, exist_ok=True)
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    chromium = next(filter(None, map(shutil.which, names)), "")
    driver = shutil.which("chromedriver") or ""
    for what, there in {
        "selenium": importlib.util.find_spec("selenium"),
        "Chromium": chromium,
        "chromedriver": driver,
    }.items():
        if not there:
            print(f"not looked at the site: {what} is not installed")
            return 0
    with served(chosen.site) as address, browser(chromium, driver) as window:
        problems = list(look(window, address, chosen.pictures))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
