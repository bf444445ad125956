"""The page in a real browser: nothing goes wrong, nothing is asked for outside, nothing is cut off,
everything can be done with the keyboard, in light and dark."""

import pytest

from d2ext.data import register_shapes, shapes
from d2ext.report import Words, write_report

from tests.report.browser import Visit, open_browser
from tests.report.helpers import make_models

IMAGES = 30
# What lies beyond the right edge, but for what is hidden or scrolls by itself.
CUT_OFF = """() => [...document.querySelectorAll('body *')].filter((x) => {
  const box = x.getBoundingClientRect();
  return box.width && box.left >= 0 && box.right > document.documentElement.clientWidth + 1;
}).map((x) => x.outerHTML.slice(0, 120))"""
# Texts whose colour is too close to that of what is behind them (WCAG 2.1, AA: 4.5).
FAINT = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const behind = (x) => {
    for (; x; x = x.parentElement) {
      const c = parse(getComputedStyle(x).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const light = (c) => { const v = c.slice(0, 3).map((x) => x / 255).map((x) =>
    x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  return [...document.querySelectorAll('p, td, th, h1, h2, h3, span, b, figcaption, dt, dd, label')]
    .filter((x) => x.textContent.trim() && x.getBoundingClientRect().width).filter((x) => {
      const a = light(parse(getComputedStyle(x).color)), b = light(behind(x));
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5;
    }).map((x) => x.outerHTML.slice(0, 120));
}"""
FOCUS = "() => document.activeElement.id || document.activeElement.getAttribute('aria-label') || ''"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    shapes.generate("val", str(folder), IMAGES)
    register_shapes("shapes_browser", "val", str(folder), IMAGES)
    records, truth, entries = make_models("shapes_browser")
    words = Words(steps=[("Use it", "d2ext predict --weights " + "long/" * 30)])
    write_report(folder / "report.html", entries, truth, records, "shapes_browser", words)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_goes_wrong_and_nothing_is_cut_off_or_faint(browser, report, width, scheme):
    visit = Visit(browser, report, width, scheme)
    assert visit.run("() => document.documentElement.scrollWidth") <= width
    assert visit.run(CUT_OFF) == []
    assert visit.run(FAINT) == []
    visit.run("() => document.querySelectorAll('details').forEach((x) => { x.open = true; })")
    assert visit.run("() => document.documentElement.scrollWidth") <= width
    assert visit.run(CUT_OFF) == []
    visit.page.evaluate("() => window.scrollTo(0, document.body.scrollHeight)")
    visit.page.wait_for_timeout(200)
    assert (visit.problems, visit.external()) == ([], [])
    visit.page.close()


def test_the_page_may_not_ask_for_anything(browser, report):
    """The page's own policy would stop a request, and this test would notice one."""
    visit = Visit(browser, report, 1280)
    visit.run("() => { new Image().src = 'https://example.invalid/x.png'; }")
    visit.page.wait_for_timeout(100)
    assert any("Content Security Policy" in text for text in visit.problems)
    visit.page.close()


def test_everything_can_be_reached_and_done_with_the_keyboard(browser, report):
    visit = Visit(browser, report, 1280)
    press = visit.page.keyboard.press
    reached = []
    for _ in range(14):
        press("Tab")
        reached.append(visit.run(FOCUS))
        ring = "() => getComputedStyle(document.activeElement).outlineStyle"
        assert visit.run(ring) != "none", reached[-1]
    assert {"class", "score", "order", "masks", "boxes", "labels"} <= set(reached)
    assert any(name.startswith("enlarge Truth") for name in reached)
    while not visit.run(FOCUS).startswith("enlarge cascade"):
        press("Tab")
    opener = visit.run(FOCUS)
    press("Enter")
    title = "() => document.getElementById('viewer-title').textContent"
    assert visit.run("() => document.getElementById('viewer').open")
    assert visit.run(title).endswith(": cascade")
    press("ArrowLeft")
    assert visit.run(title).endswith(": cascade, stage 2")
    zoom = "() => document.getElementById('viewer-canvas').dataset.zoom"
    press("+")
    visit.page.wait_for_function(f"{zoom} === undefined || ({zoom})() === '1.50'")
    press("0")
    first = visit.run(title).split(":")[0]
    press("ArrowDown")
    assert visit.run(title).split(":")[0] != first
    press("Escape")
    assert not visit.run("() => document.getElementById('viewer').open")
    assert visit.run(FOCUS) == opener
    assert visit.problems == []
    visit.page.close()


def pixels(visit, number=1):
    """The picture of the first card, of the model of this number, as text."""
    visit.run("() => document.getElementById('gallery').scrollIntoView()")
    visit.page.wait_for_timeout(150)
    return visit.run("(n) => document.querySelectorAll('.item canvas')[n].toDataURL()", number)


def test_filters_change_the_pictures_and_the_curves(browser, report):
    visit = Visit(browser, report, 1280)
    page = visit.page
    before = pixels(visit)
    assert page.inner_text("#count") == f"12 of {IMAGES} images"
    page.evaluate("() => { const s = document.getElementById('score'); s.value = 100; "
                  "s.dispatchEvent(new Event('input')); }")  # fmt: skip
    assert pixels(visit) != before and page.inner_text("#score-value") == "100%"
    page.reload()
    visit.see_pictures()
    page.uncheck("#masks")
    assert pixels(visit) != before
    charts = page.locator("#curve-charts figure:visible")
    assert charts.count() == 2
    page.select_option("#class", index=3)
    assert charts.count() == 3
    shown = int(page.inner_text("#count").split(" of ")[1].split()[0])
    assert 0 < shown < IMAGES
    page.select_option("#order", "place")
    first = page.inner_text(".item h3 >> nth=0")
    page.select_option("#order", "2")
    assert page.inner_text(".item h3 >> nth=0") != first
    page.select_option("#class", "-1")
    page.click("#more")
    assert page.locator(".item").count() == 24
    assert visit.problems == []
    page.close()


def test_colours_of_classes_are_those_of_predictions(browser, report):
    from d2ext.visualization.overlay import instance_colors

    visit = Visit(browser, report, 1280)
    shades = visit.run("() => JSON.parse(document.getElementById('data').textContent).shades")
    for label, own in enumerate(shades):
        expected = ["#" + "".join(f"{round(255 * x):02x}" for x in c)
                    for c in instance_colors([label] * 4)]  # fmt: skip
        assert own == expected
    visit.page.close()
