"""The report of trained runs in a real browser without a network, on a desktop and on a phone."""

import shutil
import time
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.__main__ import main
from benchmarks.records.atomic_files import write_json
from benchmarks.records.environment import environment
from benchmarks.records.folders import CONFIG, run_folder

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
DESKTOP = {"viewport": {"width": 1200, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
LINES, HEADS = 8, 3  # charts: all quantities, and a map per arm


@pytest.fixture(scope="module")
def report(experiment, run_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_json(folder / CONFIG, {"config": experiment.to_json(), "environment": environment()})
    for arm, seed in experiment.runs():
        shutil.copytree(run_of(experiment, arm.name, seed).folder, run_folder(folder, arm.name, seed))
    assert main(["report", str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS, timeout=300_000)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, report) -> Iterator[Callable[..., tuple[Page, list[str]]]]:
    """Opens the report in such a window: the page, and all messages, errors and further requests that it makes."""
    contexts = []

    def open_report(**window) -> tuple[Page, list[str]]:
        contexts.append(browser.new_context(offline=True, **window))
        page = contexts[-1].new_page()
        page.set_default_timeout(300_000)
        heard: list[str] = []
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda request: heard.append(f"request: {request.url}"))
        page.goto(report.as_uri())
        until(page, "document.documentElement.dataset.charts === 'drawn'")
        assert heard.pop(0) == f"request: {report.as_uri()}"
        return page, heard

    yield open_report
    for context in contexts:
        context.close()


def until(page, condition, seconds=300):
    """Playwright's own waiting evaluates strings, which the page's policy forbids. What is waited for takes seconds."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"never true: {condition}"
        page.wait_for_timeout(20)


def ranges(page, chart=0):
    """Of the axes x and y as they are drawn."""
    return page.evaluate(
        "index => (({xaxis, yaxis}) => [xaxis.range, yaxis.range])"
        "(document.querySelectorAll('.chart')[index]._fullLayout)",
        chart,
    )


def drawn(page):
    """What each visible chart has drawn, by its number: lines of more than one point, or the map's picture."""
    pairs = page.evaluate(
        """[...document.querySelectorAll(".chart")].map((c, i) => [i, c]).filter(([_, c]) => c.offsetParent).map(([i, c]) => [
            i,
            [...c.querySelectorAll(".scatterlayer path.js-line")].filter(p => /[LHV]/.test(p.getAttribute("d"))).length
              + [...c.querySelectorAll(".heatmaplayer image")].filter(i => i.width.baseVal.value > 50).length,
        ])"""  # noqa: E501
    )
    return dict(pairs)


def area(page, chart):
    return page.locator(".chart").nth(chart).locator(".nsewdrag").first


def press(page, index, clicks=1):
    """An arm's button. The next press must not count as one more click of this one."""
    button = page.locator(".legend button").nth(index)
    button.click() if clicks == 1 else button.dblclick()
    page.mouse.move(1, 1)
    page.wait_for_timeout(600)


def drag(page, chart):
    """The mouse over the middle half of the chart, both ways."""
    whole = ranges(page, chart)
    area(page, chart).scroll_into_view_if_needed()
    box = area(page, chart).bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.75 * box["height"], steps=5)
    page.mouse.up()
    until(page, f"String((({{xaxis, yaxis}}) => [xaxis.range, yaxis.range])(document.querySelectorAll('.chart')[{chart}]._fullLayout)) !== '{','.join(format(end, '') for axis in whole for end in axis)}'")  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_is_whole_without_a_network(visit, window, scheme):
    page, heard = visit(**window, color_scheme=scheme)
    width = window["viewport"]["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == page.evaluate("innerWidth") == width
    shown = drawn(page)
    assert list(shown) == list(range(LINES + HEADS))
    assert shown[0] == 9  # three arms of two seeds, and their means
    assert min(shown.values()) >= 1
    boxes = page.evaluate("[...document.querySelectorAll('.main-svg')].map(s => s.getBoundingClientRect().right)")
    assert max(boxes) <= width
    sizes = page.evaluate(
        "[...document.querySelectorAll('p, li, td, th, button, figcaption, text')].filter(e => e.textContent.trim())"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
    page.set_viewport_size({"width": 700, "height": 900})  # as when a phone is turned
    until(
        page, "[...document.querySelectorAll('.chart')].every(c => Math.abs(c.clientWidth - c._fullLayout.width) < 1)"
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 700
    assert heard == []


def test_a_zoom_outlives_the_choice_of_arms_and_seeds_and_a_double_click_ends_it(visit):
    page, heard = visit(**DESKTOP)
    for chart in (0, LINES):
        whole = ranges(page, chart)
        drag(page, chart)
        zoomed = ranges(page, chart)
        for (low, high), (first, last) in zip(zoomed, whole, strict=True):
            assert (high - low) / (last - first) == pytest.approx(0.5, abs=0.02)
        picture = f"document.querySelectorAll('.chart')[{LINES}].querySelector('.heatmaplayer image').href.baseVal"
        if chart == 0:
            first = page.evaluate(picture)
            press(page, 1)
            page.locator("#seed").select_option("3")
            until(page, f"{picture} !== '{first}'")
            assert ranges(page) == zoomed
        page.wait_for_timeout(600)
        area(page, chart).dblclick()
        until(page, f"String(document.querySelectorAll('.chart')[{chart}]._fullLayout.xaxis.range) === '{','.join(map(str, whole[0]))}'")  # fmt: skip  # noqa: E501
        assert ranges(page, chart) == whole
    assert heard == []


def test_an_arm_can_be_hidden_and_shown_alone_in_every_chart(visit):
    page, heard = visit(**DESKTOP)
    before = drawn(page)
    muon = page.locator(".legend button").nth(1)
    assert muon.inner_text() == "Muon, rate 0.03"
    press(page, 1)
    until(page, "document.querySelectorAll('.chart')[0].querySelectorAll('.js-line').length === 6")
    assert muon.get_attribute("aria-pressed") == "false"
    after = drawn(page)
    assert LINES + 1 not in after  # its map
    assert after[0] == before[0] - 3
    press(page, 1, clicks=2)
    until(page, "document.querySelectorAll('.chart')[1].querySelectorAll('.js-line').length === 3")
    assert {chart: count for chart, count in drawn(page).items() if chart >= LINES} == {LINES + 1: before[LINES + 1]}
    press(page, 1, clicks=2)
    until(page, "document.querySelectorAll('.chart')[1].querySelectorAll('.js-line').length === 9")
    assert drawn(page) == before
    assert heard == []


def test_on_a_phone_a_finger_scrolls_and_buttons_zoom(visit):
    page, heard = visit(**PHONE)
    page.locator(".chart").first.scroll_into_view_if_needed()
    box = area(page, 0).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    session = page.context.new_cdp_session(page)

    def touch(kind, *points):
        ends = [{"x": x, "y": y + dy, "id": 0} for dy in points]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": ends})

    whole, scrolled = ranges(page), page.evaluate("scrollY")
    touch("touchStart", 80)
    for moved in range(70, -90, -10):
        touch("touchMove", moved)
        page.wait_for_timeout(16)
    touch("touchEnd")
    until(page, f"scrollY > {scrolled + 50}")  # one finger moves the page, not the chart
    assert ranges(page) == whole
    zoom = page.locator(".chart").first.locator('[data-title="Zoom in"]')
    zoom.tap()
    until(page, f"document.querySelector('.chart')._fullLayout.xaxis.range[1] < {whole[0][1]}")
    (low, high), (first, last) = ranges(page)[0], whole[0]
    assert (high - low) / (last - first) == pytest.approx(0.5, abs=0.05)
    assert heard == []
