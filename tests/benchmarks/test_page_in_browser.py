"""The report of a trained panel in a real browser without a network, on a desktop and on a phone."""

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, sync_playwright

from benchmarks.__main__ import main
from benchmarks.execution.worker import CONFIG, run_folder
from benchmarks.records.atomic_files import write_json
from benchmarks.records.environment import environment
from benchmarks.training.run import Run

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
DESKTOP = {"viewport": {"width": 1200, "height": 900}}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
LINES, HEADS = 8, 3  # charts: all quantities, and a map per arm


@pytest.fixture
def folder(panel, corpus, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    write_json(folder / CONFIG, {"config": panel.to_json(), "environment": environment()})
    for arm, seed in panel.runs():
        Run(panel, corpus, run_folder(folder, arm, seed), arm, seed).train(lambda record: None)
    assert main(["report", str(folder)]) == 0
    return folder


@pytest.fixture
def visit(folder) -> Iterator[Callable[..., tuple[Page, list[str]]]]:
    """Opens the report in such a window: the page, and all messages, errors and further requests that it makes."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)

        def open_report(**window) -> tuple[Page, list[str]]:
            page = browser.new_context(offline=True, **window).new_page()
            heard: list[str] = []
            page.on("console", lambda message: heard.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: heard.append(f"error: {error}"))
            page.on("request", lambda request: heard.append(f"request: {request.url}"))
            address = (folder / "report.html").as_uri()
            page.goto(address)
            until(page, "document.documentElement.dataset.charts === 'drawn'")
            assert heard.pop(0) == f"request: {address}"
            return page, heard

        yield open_report
        browser.close()


def until(page, condition, seconds=30):
    """Playwright's own waiting evaluates strings, which the page's policy forbids."""
    for _ in range(seconds * 20):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {condition}")


def ranges(page, chart=0):
    """Of the axes x and y as they are drawn."""
    return page.evaluate(
        f"(({{xaxis, yaxis}}) => [xaxis.range, yaxis.range])(document.getElementById('chart-{chart}')._fullLayout)"
    )


def drawn(page):
    """What each visible chart has drawn, by its number: lines of more than one point, or the map's picture."""
    pairs = page.evaluate(
        """[...document.querySelectorAll(".chart")].filter(c => c.offsetParent).map(c => [
            Number(c.id.slice(6)),
            [...c.querySelectorAll(".scatterlayer path.js-line")].filter(p => /[LHV]/.test(p.getAttribute("d"))).length
              + [...c.querySelectorAll(".heatmaplayer image")].filter(i => i.width.baseVal.value > 50).length,
        ])"""
    )
    return dict(pairs)


def drag(page, chart):
    """The mouse over the middle half of the chart, both ways."""
    area = page.locator(f"#chart-{chart} .nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.75 * box["height"], steps=5)
    page.mouse.up()
    page.wait_for_timeout(600)  # longer than what makes two clicks one


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_is_whole_without_a_network(visit, window, scheme):
    page, heard = visit(**window, color_scheme=scheme)
    width = window["viewport"]["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == page.evaluate("innerWidth") == width
    shown = drawn(page)
    assert list(shown) == list(range(LINES + HEADS))
    assert all(shown[chart] >= 1 for chart in range(LINES, LINES + HEADS))
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


def test_dragging_zooms_and_a_double_click_shows_the_whole(visit):
    page, heard = visit(**DESKTOP)
    for chart in (0, LINES):
        whole = ranges(page, chart)
        drag(page, chart)
        for (low, high), (first, last) in zip(ranges(page, chart), whole, strict=True):
            assert (high - low) / (last - first) == pytest.approx(0.5, abs=0.02)
        page.locator(f"#chart-{chart} .nsewdrag").first.dblclick()
        page.wait_for_timeout(500)
        assert ranges(page, chart) == whole
    assert heard == []


def test_an_arm_can_be_hidden_and_shown_alone_in_every_chart(visit):
    page, heard = visit(**DESKTOP)
    before = drawn(page)
    muon = page.locator(".legend button").nth(1)
    assert muon.inner_text() == "Muon, rate 0.03"
    muon.click()
    until(page, "document.querySelectorAll('#chart-0 .js-line').length === 6")
    assert muon.get_attribute("aria-pressed") == "false"
    after = drawn(page)
    assert LINES + 1 not in after  # its map
    assert after[0] == before[0] - 3
    page.wait_for_timeout(600)
    muon.dblclick()
    until(page, "document.querySelectorAll('#chart-1 .js-line').length === 3")
    assert {chart: count for chart, count in drawn(page).items() if chart >= LINES} == {LINES + 1: before[LINES + 1]}
    page.wait_for_timeout(600)
    muon.dblclick()
    until(page, "document.querySelectorAll('#chart-1 .js-line').length === 9")
    assert drawn(page) == before
    assert heard == []


def test_a_zoom_outlives_the_hiding_of_an_arm_and_the_choice_of_a_seed(visit):
    page, _ = visit(**DESKTOP)
    whole = ranges(page)
    drag(page, 0)
    zoomed = ranges(page)
    assert zoomed != whole
    picture = f"document.querySelector('#chart-{LINES} .heatmaplayer image').href.baseVal"
    first = page.evaluate(picture)
    assert first.startswith("data:image/png")
    page.locator(".legend button").nth(1).click()
    page.locator("#seed").select_option("3")
    until(page, f"{picture} !== '{first}'")
    assert ranges(page) == zoomed
    page.locator("#chart-0 .nsewdrag").first.dblclick()
    page.wait_for_timeout(500)
    assert ranges(page) == whole


def test_fingers_zoom_scroll_and_go_back(visit):
    page, heard = visit(**PHONE)
    page.locator("#chart-0").scroll_into_view_if_needed()
    box = page.locator("#chart-0 .nsewdrag").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    session = page.context.new_cdp_session(page)

    def touch(kind, *points):
        session.send(
            "Input.dispatchTouchEvent",
            {"type": kind, "touchPoints": [{"x": x + dx, "y": y + dy, "id": i} for i, (dx, dy) in enumerate(points)]},
        )

    whole = ranges(page)
    touch("touchStart", (-30, -30), (30, 30))
    for reach in (35, 40, 50, 60):
        touch("touchMove", (-reach, -reach), (reach, reach))
    touch("touchEnd")
    page.wait_for_timeout(200)
    for (low, high), (first, last) in zip(ranges(page), whole, strict=True):
        assert (high - low) / (last - first) == pytest.approx(0.5, abs=0.02)
        assert (high + low) / 2 == pytest.approx((first + last) / 2, abs=0.05 * (last - first))

    pinched, scrolled = ranges(page), page.evaluate("scrollY")
    touch("touchStart", (0, 80))
    for moved in range(70, -90, -10):
        touch("touchMove", (0, moved))
        page.wait_for_timeout(16)
    touch("touchEnd")
    page.wait_for_timeout(600)
    assert page.evaluate("scrollY") > scrolled + 50  # one finger moves the page, not the chart
    assert ranges(page) == pinched

    page.locator("#chart-0").scroll_into_view_if_needed()
    box = page.locator("#chart-0 .nsewdrag").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for _ in range(2):
        touch("touchStart", (0, 0))
        touch("touchEnd")
    page.wait_for_timeout(300)
    assert ranges(page) == whole
    assert heard == []
