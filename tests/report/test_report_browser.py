"""The page in a real browser, on a phone and on a desktop, light and dark: no errors, nothing cut off."""

import os
import shutil

import pytest

pytest.importorskip("matplotlib", reason="pip install 'hf_disparse[plot]'")

from hf_disparse.report import theme
from hf_disparse.report.write import write_comparison, write_report
from tests.helpers.analyses import analysis, comparison

PROGRAMS = [shutil.which("chromium"), shutil.which("chromedriver")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(PROGRAMS) and not os.environ.get("CI"),
        reason="no browser here: apt-get install chromium chromium-driver",
    ),
]

# Elements beyond the page's edges, unless their container scrolls; text beyond its drawing; text too small to read.
FAULTS = """
document.querySelectorAll('details').forEach(d => d.open = true);
const width = document.documentElement.clientWidth, faults = [];
if (document.documentElement.scrollWidth > width) faults.push('page scrolls to ' + document.documentElement.scrollWidth);
const label = e => e.tagName + ' ' + (e.textContent || '').trim().slice(0, 40);
for (const e of document.body.querySelectorAll('*')) {
  const box = e.getBoundingClientRect();
  if (!box.width || !box.height) continue;
  const scroll = e.parentElement.closest('.scroll');
  if (scroll && getComputedStyle(scroll).overflowX === 'auto') continue;
  const svg = e.ownerSVGElement;
  if (svg && e.tagName !== 'text') continue;
  const frame = svg ? svg.getBoundingClientRect() : {left: 0, right: width, top: -1e9, bottom: 1e9};
  if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
    faults.push('beyond the edge: ' + label(e));
  if (e.tagName === 'text') {
    const size = parseFloat(getComputedStyle(e).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    if (size < 8.9) faults.push('letters of ' + size + ': ' + label(e));
  }
}
return faults;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert all(PROGRAMS), f"CI has no browser: {PROGRAMS}"
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS[0]
    for name in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-sync",
        "disable-dev-shm-usage",
    ):
        options.add_argument(f"--{name}")
    for name in ("disable-background-networking", "disable-component-update"):
        options.add_argument(f"--{name}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(PROGRAMS[1]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of three tasks, one of twelve with long names, and a comparison of many methods."""
    folder = tmp_path_factory.mktemp("pages")
    long = [f"a_task_with_quite_a_long_name_{i}" for i in range(12)]
    methods = ["random", "magnitude", "joint", "unanimous", "quorum2", "movement-soft", "platon", "dynamic"]
    return {
        "three": write_report(analysis(["a", "b", "c"], layers=2, stages=("dense", "sparse")), folder / "three"),
        "twelve": write_report(analysis(long, layers=2, stages=("sparse",)), folder / "twelve"),
        "compare": write_comparison(comparison(methods, tasks=long), folder / "compare"),
    }


def look(browser, path, width: int, scheme: str) -> list:
    """The faults on the page and the messages of the console."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get_log("browser")
    browser.get(path.as_uri())
    shown = browser.execute_script("return window.innerWidth")  # a phone zooms out to show what is too wide
    wide = [f"page scrolls: {shown} pixels"] if shown != width else []
    return wide + browser.execute_script(FAULTS) + [entry["message"] for entry in browser.get_log("browser")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["three", "twelve", "compare"])
def test_no_error_and_nothing_cut_off(browser, pages, name, width, scheme):
    assert look(browser, pages[name], width, scheme) == []
    shown = browser.execute_script("return [...document.querySelectorAll('svg')].filter(s => s.clientWidth).length")
    assert shown == len(
        browser.execute_script("return [...document.querySelectorAll('figure')]")
    )  # one of the two sizes
    table = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
    )
    assert width > 500 or max(table) > 0  # wide tables are there and can be scrolled


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_have_the_colours_of_the_page(browser, pages, scheme):
    look(browser, pages["three"], 390, scheme)

    def computed(what: str, key: str) -> str:
        return browser.execute_script(f"return getComputedStyle(document.querySelector('{what}')).{key}")

    def rgb(colour: str) -> str:
        colour = theme.DARK[colour] if scheme == "dark" else colour
        return "rgb({}, {}, {})".format(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)))

    assert computed("body", "backgroundColor") == rgb(theme.PAPER)
    assert computed("body", "color") == rgb(theme.INK) == computed(".narrow text", "fill")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<p style='width: 500px'>wide</p>", "page scrolls"),
        ("<div style='overflow: hidden'><p style='width: 500px'>wide</p></div>", "beyond the edge"),
        ("<svg viewBox='0 0 100 20' width='100'><text x='90' y='15' font-size='12'>long label</text></svg>", "beyond"),
        ("<svg viewBox='0 0 800 20' width='100'><text y='15' font-size='12'>tiny</text></svg>", "letters"),
        ("<script>nonsense()</script>", "nonsense"),
    ],
)
def test_the_check_sees_a_planted_fault(browser, tmp_path, body, fault):
    path = tmp_path / "page.html"
    path.write_text(
        f"<!doctype html><link rel=icon href='data:,'><meta name=viewport content='width=device-width'><body>{body}"
    )
    assert fault in " ".join(look(browser, path, 390, "light"))
