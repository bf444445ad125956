"""dev/build_site.py: links that lead nowhere are found. `make docs` builds the site itself."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = '<html><body><h1 id="top">A</h1>{}</body></html>'


def write(folder, **pages):
    for name, body in pages.items():
        (folder / f"{name}.html").write_text(PAGE.format(body))


def test_links_to_files_and_places_that_exist_are_no_problem(script, tmp_path):
    (tmp_path / "b").mkdir()
    links = '<a href="b/">b</a><a href="#top">t</a><a href="b/index.html#top">t</a>'
    write(tmp_path, a=links + '<a href="https://example.org/x">out</a><img src="a.html">')
    write(tmp_path / "b", index='<a href="../a.html">a</a>')
    assert script.problems(tmp_path) == []


def test_links_that_lead_nowhere_are_named_with_their_page(script, tmp_path):
    write(tmp_path, a='<a href="b.html">b</a><a href="#bottom">c</a><img src="c.png">')
    assert script.problems(tmp_path) == [
        "a.html links to b.html, which does not exist",
        "a.html links to #bottom, which has no such place",
        "a.html links to c.png, which does not exist",
    ]


def test_what_a_browser_would_load_from_elsewhere_is_named(script, tmp_path):
    write(tmp_path, a='<script src="https://cdn.example.org/x.js"></script>')
    assert script.problems(tmp_path) == ["a.html loads https://cdn.example.org/x.js"]


def test_every_page_of_the_documentation_is_in_a_table_of_contents():
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^[\w./]+\.(?:md|rst)$", text, re.MULTILINE))
    kinds = ["*.md", "docs/**/*.md", "docs/*.rst", "projects/**/README.md", "examples/*/README.md"]
    wanted = {_seen(path) for kind in kinds for path in ROOT.glob(kind)}
    assert wanted - {"index.md"} == listed


def _seen(path):
    """A page's path as docs/index.md says it."""
    if ROOT / "docs" in path.parents:
        return str(path.relative_to(ROOT / "docs"))
    return f"../{path.relative_to(ROOT)}"
