"""A real browser for tests of pages: Chromium through Playwright, or why there is none."""

import contextlib
import importlib.util
import os
import shutil

import pytest

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")


def find_browser():
    """Path of an installed Chromium, one that Playwright brought included; None without any, or
    without Playwright."""
    if importlib.util.find_spec("playwright") is None:
        return None
    from playwright.sync_api import sync_playwright

    for name in NAMES:
        if shutil.which(name):
            return shutil.which(name)
    with sync_playwright() as running:
        path = running.chromium.executable_path
    return path if os.path.isfile(path) else None


@contextlib.contextmanager
def open_browser(*flags):
    """A running headless Chromium, started with further flags; skips the test where none is
    installed."""
    path = find_browser()
    if path is None:
        pytest.skip(
            f"no browser is installed: none of {', '.join(NAMES)}, none of Playwright's; or "
            "Playwright itself is not"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox", *flags])
        yield browser
        browser.close()


class Visit:
    """A page that is open, with what went wrong in it.

    Attributes:
        page: Playwright's.
        problems: messages of the console that are errors or warnings, and uncaught exceptions.
        requests: addresses that were asked for beside the page's own.
    """

    def __init__(self, browser, path, width, scheme="light", height=900):
        self.problems, self.requests = [], []
        self.page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"file://{path}")
        self.requests = [url for url in self.requests if not url.startswith(("data:", "file:"))]
        self.see_pictures()

    def see_pictures(self):
        """Scroll to the pictures, and back, so that they are painted. (After `scrollIntoView`, the
        Tab key would go on from there in Chromium 150.)"""
        self.page.wait_for_selector(".item")
        self.run("() => window.scrollTo(0, document.getElementById('gallery').offsetTop)")
        self.page.wait_for_selector("canvas[data-painted]")
        self.run("() => window.scrollTo(0, 0)")

    def _note(self, message):
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def run(self, script, *arguments):
        """The value of an expression in the page."""
        return self.page.evaluate(script, *arguments)

    def external(self):
        """Addresses outside of the page that were asked for until now."""
        return [url for url in self.requests if not url.startswith(("data:", "file:"))]
