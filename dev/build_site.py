#!/usr/bin/env python3
"""Build the site of this repository's pages with Sphinx, warnings as errors, and follow every link
in it; what `make docs` calls.

dev/build_site.py [FOLDER]     # default output/site
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
# What a browser loads by itself to show a page.
LOADED = {"img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src"}


class Page(HTMLParser):
    """Anchors, links, and what is loaded for one HTML file."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors.update(x for x in (values.get("id"), values.get("name")) if x)
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif values.get(LOADED.get(tag)):
            self.loaded.append(values[LOADED[tag]])


def problems(folder: Path) -> list[str]:
    """A line for each link that leads nowhere, and for whatever is loaded from elsewhere."""
    pages = {path: Page(path) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        for link in page.loaded:
            if urlsplit(link).netloc:
                found.append(f"{name} loads {link}")
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            place = unquote(parts.path)
            target = (path.parent / place).resolve() if place else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                found.append(f"{name} links to {link}, which does not exist")
            elif parts.fragment and target in pages:
                if unquote(parts.fragment) not in pages[target].anchors:
                    found.append(f"{name} links to {link}, which has no such place")
    return found


def build(folder: Path) -> int:
    """Exit status of Sphinx; pages of an earlier build that are current are kept."""
    from sphinx.cmd.build import main as sphinx

    options = ["--fail-on-warning", "--keep-going", "--quiet", "--conf-dir", str(ROOT / "docs")]
    return sphinx([*options, str(ROOT), str(folder)])


def main(folder: str = "output/site") -> int:
    """1 for warnings of Sphinx and for links that lead nowhere."""
    target = Path(folder).resolve()
    if build(target):
        return 1
    found = problems(target)
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    if not found:
        print(f"{target / 'index.html'}: {len(list(target.rglob('*.html')))} pages, all links lead")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
