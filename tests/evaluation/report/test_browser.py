"""The page in a real browser, headless Chromium: what it asks for, how it sorts, whether it fits, what it prints."""

import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import history

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.report.contents import Sections
from bayes_kf.evaluation.report.report import Report
from bayes_kf.evaluation.report.sortable_tables import Cell, make_table

playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "<script>alert(1)</script>"
CASES = ("2", "10", "100", "1000", "regression", "comparison")
DESKTOP, PHONE = (1200, 900), (360, 740)


@dataclass
class Visit:
    """A page that was opened, and everything it asked for, said and did meanwhile."""

    page: playwright.Page
    asked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def open(self, path: Path) -> "Visit":
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.route("**/*", lambda route: route.continue_() if _is_local(route.request.url) else route.abort())
        self.page.goto(path.as_uri())
        return self


def _is_local(url: str) -> bool:
    return url.startswith(("file:", "data:"))


def class_names(num_classes: int) -> list[str]:
    return [HOSTILE, *(f"class {i}" for i in range(1, num_classes))]


def examples(num_classes: int, count: int):
    """Texts, small grey images, standardized colour images and large photographs."""
    generator = np.random.default_rng(0)
    return {
        2: [f"{HOSTILE} Text number {i}. " * (1 + i % 20) for i in range(count)],
        10: generator.random((count, 1, 8, 8)),
        100: torch.from_numpy(generator.standard_normal((count, 3, 32, 32))),
        1000: [generator.integers(0, 256, (200, 300, 3)).astype(np.uint8)] * count,
    }[num_classes]


def classifier_case(num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and labels; of many classes some never come."""
    generator = torch.Generator().manual_seed(num_classes)
    probs = (3 * torch.randn(300, num_classes, generator=generator)).softmax(dim=1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


def classifier_report(num_classes: int) -> Report:
    probs, targets = classifier_case(num_classes)
    return ev.evaluate_predictions(
        probs,
        targets,
        ood={HOSTILE: torch.full((40, num_classes), 1 / num_classes)},
        history=history(),
        parameter_variance={HOSTILE: torch.rand(3), "b": torch.rand(2)},
        examples=examples(num_classes, 300),
        config={HOSTILE: HOSTILE, "folder": "/long" * 40},
        class_names=class_names(num_classes),
        title=f"{HOSTILE} {num_classes}",
        num_simulations=39,
    )


def regression_report() -> Report:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(200, generator=generator)
    targets = mean + torch.randn(200, generator=generator)
    return ev.evaluate_regression(
        mean, targets, variance=torch.rand(200, generator=generator) + 0.5, title=HOSTILE, num_simulations=39
    )


def find_browser() -> str | None:
    """The browser named in BAYES_KF_CHROMIUM, or the first on PATH that starts (some only say how to install one)."""
    if named := os.environ.get("BAYES_KF_CHROMIUM"):
        return named
    for path in filter(None, map(shutil.which, BROWSERS)):
        if subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    return None


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    if path is None:
        pytest.skip(
            "no Chromium to open the page in: neither on PATH nor at BAYES_KF_CHROMIUM; scripts/test installs it"
        )
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path)
        yield running
        running.close()


def comparison_report() -> Report:
    probs, targets = classifier_case(10)
    return ev.report_comparison(
        {HOSTILE: probs, "sharper": (3 * probs.log()).softmax(dim=1)}, targets, num_simulations=39
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Path of each case's page, made on first use."""
    folder, made = tmp_path_factory.mktemp("pages"), {}

    def page_of(case: str) -> Path:
        if case not in made:
            make = {"regression": regression_report, "comparison": comparison_report}
            report = make[case]() if case in make else classifier_report(int(case))
            made[case] = folder / f"{case}.html"
            made[case].write_text(report.to_html(), encoding="utf-8")
        return made[case]

    return page_of


@pytest.fixture
def visit(browser):
    """Opens a page in a context of its own."""
    contexts = []

    def opened(path: Path, size=DESKTOP, **settings) -> Visit:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **settings)
        contexts.append(context)
        return Visit(context.new_page()).open(path)

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def small_table(visit, tmp_path):
    """A page with one table of awkward cells."""
    rows = (
        ("item 10", 3, "no"),
        ("item 9", math.nan, "yes"),
        ("Item 2", 1200, "no"),
        ("item 1", Cell("−1.5", -1.5), "yes"),
        ("item 20", math.inf, ""),
        ("item 3", 3, "no"),
        ("item 4", -math.inf, "yes"),
    )
    sections = Sections(tables=[make_table("Awkward", ("Item", "Number", "Word"), rows, is_open=True)])
    path = tmp_path / "small.html"
    path.write_text(Report("Small", {}, sections).to_html(), encoding="utf-8")
    return visit(path).page


def column(page, caption: str, place: int) -> list[str]:
    """Texts of a column of a table, as they stand."""
    return page.locator("table", has_text=caption).locator(f"tbody tr > :nth-child({place + 1})").all_text_contents()


def heading(page, caption: str, name: str):
    """The heading of a column."""
    return page.locator("table", has_text=caption).get_by_role("columnheader", name=name, exact=True)


@pytest.mark.parametrize("case", CASES)
def test_pages_load_in_silence_ask_for_nothing_and_fit(case, pages, visit):
    path = pages(case)
    seen = visit(path)
    page = seen.page
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    for width, height in (DESKTOP, PHONE):
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert seen.said == []
    assert [url for url in seen.asked if not url.startswith("data:")] == [path.as_uri()]
    assert page.evaluate("document.scripts.length") == 1
    images = page.evaluate("[...document.images].map(image => [image.naturalWidth, image.naturalHeight, image.alt])")
    boxes = "(svg => { const box = svg.getBoundingClientRect(); return [box.width, box.height, svg.ariaLabel]; })"
    drawn = page.evaluate(f"[...document.querySelectorAll('figure > svg')].map{boxes}")
    assert len(drawn) >= 3
    assert all(width > 0 and height > 0 and alt for width, height, alt in images + drawn)
    assert path.stat().st_size < 5_000_000


def test_the_watch_sees_requests_dialogs_messages_and_overflow(visit, tmp_path):
    path = tmp_path / "leaky.html"
    path.write_text(
        "<!DOCTYPE html><img src='https://example.org/x.png'><p style='width: 999px'>wide</p>"
        "<script>alert(1); console.log(2); undefinedFunction()</script>",
        encoding="utf-8",
    )
    seen = visit(path, PHONE)
    assert seen.asked == [path.as_uri(), "https://example.org/x.png"]
    assert {"1", "2"} < set(seen.said)
    assert any("undefinedFunction" in text for text in seen.said)
    assert seen.page.evaluate("document.documentElement.scrollWidth") > PHONE[0]


def test_names_are_text(pages, visit):
    seen = visit(pages("2"))
    page = seen.page
    assert page.title() == f"{HOSTILE} 2"
    assert HOSTILE in page.locator("h1").inner_text()
    assert HOSTILE in column(page, "Class by class", 0)
    assert page.locator(".settings th", has_text=HOSTILE).count() >= 1
    assert HOSTILE in page.locator(".card p").last.inner_text()
    assert seen.said == []


@pytest.mark.parametrize("case", ["2", "10", "100", "1000"])
def test_examples_are_shown(case, pages, visit):
    page = visit(pages(case)).page
    cards = page.locator(".gallery li")
    assert 12 < cards.count() <= 24
    for card in (cards.first, cards.last):
        card.scroll_into_view_if_needed()
        assert "Predicted" in card.inner_text()
        assert "Example" in card.inner_text()
    if case == "2":
        texts = page.locator(".gallery .text").all_text_contents()
        assert all(text.startswith(HOSTILE) and len(text) <= 300 for text in texts)
        return
    sizes = page.evaluate(
        "[...document.querySelectorAll('.gallery img')].map(image => [image.naturalWidth, image.clientWidth,"
        " getComputedStyle(image).imageRendering])"
    )
    natural, shown, rendering = {
        "10": (8, 128, "pixelated"),
        "100": (32, 128, "pixelated"),
        "1000": (160, 160, "auto"),
    }[case]
    assert len(sizes) == cards.count()
    assert {(size[0], size[2]) for size in sizes} == {(natural, rendering)}
    assert {abs(size[1] - shown) <= 2 for size in sizes} == {True}  # the frame is part of its width


ORDERS = {
    "Item": ["item 1", "Item 2", "item 3", "item 4", "item 9", "item 10", "item 20"],
    "Number": ["−∞", "−1.5", "3", "3", "1,200", "∞", "not defined"],
    "Word": ["no", "no", "no", "yes", "yes", "yes", ""],
}
BACKWARDS = {
    "Item": ORDERS["Item"][::-1],
    "Number": ["∞", "1,200", "3", "3", "−1.5", "−∞", "not defined"],
    "Word": ["yes", "yes", "yes", "no", "no", "no", ""],
}


@pytest.mark.parametrize(
    ("name", "how"),
    [("Item", "click"), ("Number", "click"), ("Word", "click"), ("Number", "Enter"), ("Number", "Space")],
)
def test_tables_sort_both_ways_and_back(name, how, small_table):
    page, place = small_table, list(ORDERS).index(name)
    head, other = heading(page, "Awkward", name), heading(page, "Awkward", "Word" if name != "Word" else "Item")
    first = column(page, "Awkward", place)
    for order, state in ((ORDERS[name], "ascending"), (BACKWARDS[name], "descending"), (first, "none")):
        if how == "click":
            head.click()
        else:
            head.get_by_role("button").focus()
            page.keyboard.press(how)
        assert column(page, "Awkward", place) == order
        assert head.get_attribute("aria-sort") == state
        assert other.get_attribute("aria-sort") == "none"


def test_equal_rows_keep_their_order_both_ways(small_table):
    for expected in (["item 10", "Item 2", "item 3"], ["item 10", "Item 2", "item 3"]):
        heading(small_table, "Awkward", "Word").click()
        words = dict(zip(column(small_table, "Awkward", 0), column(small_table, "Awkward", 2), strict=True))
        assert [item for item, word in words.items() if word == "no"] == expected


@pytest.mark.parametrize("case", ["2", "10", "100", "1000"])
def test_classes_sort_by_click_and_by_keyboard(case, pages, visit):
    page = visit(pages(case)).page
    _, targets = classifier_case(int(case))
    names, came = class_names(int(case)), torch.bincount(targets, minlength=int(case)).tolist()
    page.locator("summary", has_text="Class by class").click()
    heading(page, "Class by class", "Examples").click()
    assert column(page, "Class by class", 0) == [names[c] for c in sorted(range(len(names)), key=lambda c: came[c])]
    heading(page, "Class by class", "Examples").get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert column(page, "Class by class", 0) == [names[c] for c in sorted(range(len(names)), key=lambda c: -came[c])]
    heading(page, "Class by class", "Class").click()
    assert column(page, "Class by class", 0) == names  # "class 10" after "class 9"; "<" before letters
    heading(page, "Class by class", "Recall").click()
    recall = column(page, "Class by class", 2)
    defined = [float(text) for text in recall if text != "not defined"]
    assert defined == sorted(defined)
    assert recall[len(defined) :] == ["not defined"] * came.count(0)


@pytest.mark.parametrize("case", ["10", "regression"])
def test_scores_sort_inside_their_groups(case, pages, visit):
    page = visit(pages(case)).page
    table = page.locator("table.scores")
    titles = table.locator(".group").all_text_contents()
    labels = [body.locator("tr:not(.group) > th").all_text_contents() for body in table.locator("tbody").all()]
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    table.get_by_role("columnheader", name="Value", exact=True).get_by_role("button").press("Enter")
    assert table.locator(".group").all_text_contents() == titles
    for body, before in zip(table.locator("tbody").all(), labels, strict=True):
        assert sorted(body.locator("tr:not(.group) > th").all_text_contents()) == sorted(before)
        values = [float(text.replace("−", "-")) for text in body.locator("td:nth-child(2)").all_text_contents()]
        assert values == sorted(values)
        assert body.locator("tr").first.get_attribute("class") == "group"


def test_a_search_shows_the_scores_with_its_words_and_their_groups(pages, visit):
    page = visit(pages("10")).page
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    table, field = page.locator("table.scores"), page.get_by_role("searchbox", name="Table of scores")
    rows = table.locator("tbody tr:not(.group)")
    count = rows.count()
    field.fill("ece mass")
    shown = [row.locator("th").inner_text() for row in rows.all() if row.is_visible()]
    assert [text.split("\n")[0] for text in shown] == ["ECE, equal mass"]
    assert [group.inner_text() for group in table.locator(".group").all() if group.is_visible()] == ["Calibration"]
    field.fill("")
    assert sum(row.is_visible() for row in rows.all()) == count


def test_a_threshold_reads_coverage_and_risk(pages, visit):
    page = visit(pages("10")).page
    slider = page.get_by_role("slider", name="Answer only when the confidence is at least")
    assert slider.is_visible()
    probs, targets = classifier_case(10)
    confidence, wrong = probs.max(1).values, probs.argmax(1) != targets
    for step in (0, 50, 70):
        slider.fill(str(step))
        chosen = confidence >= step / 100
        text = page.locator(".threshold output").inner_text()
        assert text.startswith(f"{step:.1f} %: {100 * (1 - chosen.double().mean()):.1f} % of inputs get no answer")
        assert f"{100 * wrong[chosen].double().mean():.1f} % of the answers are wrong" in text
        assert slider.get_attribute("aria-valuetext") == text


def test_a_class_is_picked_in_the_reliability_diagram(pages, visit):
    page = visit(pages("10")).page
    probs, targets = classifier_case(10)
    confidence, predicted = probs.max(1)
    select, note = page.get_by_label("Show", exact=True), page.locator(".parts output")

    def points():
        tips = page.locator("[data-part] title").evaluate_all(
            "all => all.filter(tip => tip.closest('[data-part]').getBoundingClientRect().width).map(t => t.textContent)"
        )
        said = [re.match(r"confidence ([\d.]+), accuracy ([\d.]+) ", tip).groups() for tip in tips]
        return sorted((float(confidence), float(accuracy)) for confidence, accuracy in said)

    def expected(chosen):
        found = []
        for low in range(10):
            inside = chosen & (confidence >= low / 10) & ((confidence < (low + 1) / 10) | (low == 9))
            if inside.any():
                right = (predicted == targets)[inside].double().mean()
                found.append((round(float(confidence[inside].mean()), 3), round(float(right), 3)))
        return sorted(found)

    np.testing.assert_allclose(points(), expected(predicted >= 0), atol=6e-4)
    number = [k for k, count in enumerate(predicted.bincount()) if count >= 10][1]
    assert class_names(10)[number] in select.locator("option").nth(2).inner_text()
    select.select_option("2")
    np.testing.assert_allclose(points(), expected(predicted == number), atol=6e-4)
    assert note.inner_text().startswith(f"{int((predicted == number).sum())} of them; ")
    select.select_option("0")
    np.testing.assert_allclose(points(), expected(predicted >= 0), atol=6e-4)


def test_a_link_opens_what_is_folded_in_its_part(pages, visit):
    page = visit(pages("10")).page
    table = page.locator("table.scores")
    assert not table.is_visible()
    page.get_by_role("link", name="All scores").click()
    table.wait_for(state="visible", timeout=5000)  # the event comes after the click


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_readers_colours(scheme, pages, visit):
    page = visit(pages("10")).page
    page.emulate_media(color_scheme=scheme)
    colours = page.evaluate(
        "[getComputedStyle(document.body), getComputedStyle(document.querySelector('figure > svg text'))]"
        ".map((style, place) => place ? style.fill : style.backgroundColor)"
    )
    ground, text = (sum(int(part) for part in colour[4:-1].split(",")) / 3 for colour in colours)
    assert (ground > 200 > 100 > text) if scheme == "light" else (ground < 50 < 200 < text)


def test_the_answers_and_the_diagram_stand_above_the_fold(pages, visit):
    page = visit(pages("10"), (1400, 900)).page
    for selector in (".headline", ".cards", ".main-figure svg"):
        box = page.locator(selector).last.bounding_box()
        assert box["y"] + box["height"] <= 900


def test_print_opens_what_is_folded(pages, visit):
    page = visit(pages("10")).page
    seen = "[...document.querySelectorAll('main table')].map(table => table.checkVisibility())"
    before = page.evaluate(seen)
    assert not all(before)
    page.emulate_media(media="print")
    assert page.evaluate(seen) == [True] * len(before)
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    scrolls = "[...document.querySelectorAll('.scroll')].some(part => getComputedStyle(part).overflowY !== 'visible')"
    assert page.evaluate(scrolls) is False


def test_without_scripts_everything_is_there(pages, visit):
    scripted, plain = (visit(pages("10"), java_script_enabled=enabled).page for enabled in (True, False))
    for selector in ("tbody tr", "figure img, figure svg", "details", "h2", "h3", ".gallery li"):
        assert plain.locator(selector).count() == scripted.locator(selector).count()
    assert plain.locator("button").count() == 0
    assert scripted.locator("th button").count() == scripted.locator("thead th").count()
    assert plain.locator("thead th").all_text_contents() == scripted.locator("thead th").all_text_contents()
    assert not plain.get_by_text("Press a heading").is_visible()
    summary = plain.locator("details summary").first
    summary.click()
    assert plain.locator("details").first.locator("table").is_visible()


def test_the_keyboard_reaches_the_summary_and_every_part(pages, visit):
    page = visit(pages("10")).page
    page.keyboard.press("Tab")
    skip = page.locator(":focus")
    assert skip.inner_text() == "Skip to the summary"
    assert skip.bounding_box()["width"] > 50
    page.keyboard.press("Enter")
    assert page.url.endswith("#main")
    for link in page.locator("nav a").all():
        link.press("Enter")
        assert page.locator(f":target:has-text('{link.inner_text()}')").is_visible()
    details = page.locator("details").first
    details.locator("summary").press("Enter")
    assert details.locator("table").is_visible()


def test_headings_are_in_order_and_every_table_and_part_has_a_name(pages, visit):
    page = visit(pages("10")).page
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(head => Number(head.tagName[1]))")
    assert levels[:2] == [1, 2]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.evaluate("[...document.querySelectorAll('table')].every(table => table.caption?.textContent.trim())")
    assert page.evaluate("[...document.querySelectorAll('th')].every(head => head.scope)")
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(part => part.id)")
    assert len(ids) == len(set(ids))
    named = page.evaluate(
        "[...document.querySelectorAll('[aria-labelledby]')].map(part => part.getAttribute('aria-labelledby'))"
    )
    assert named
    assert set(named) <= set(ids)
