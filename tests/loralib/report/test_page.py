"""report.html in a real browser: light and dark, narrow and wide, by keyboard, with a name that is out to do harm."""

import math
import os
import re
import shutil

import pytest

from loralib.report.results import Choice, RankResults, RankRow
from loralib.report.writing import write_report

BROWSER = os.environ.get("DYLORA_BROWSER") or shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = 'a</script><img src=x onerror="window.hurt = 1"><!-- ' + "long" * 40


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None and not os.environ.get("DYLORA_BROWSER_TESTS"):
        pytest.skip("no browser: install chromium, or name one with DYLORA_BROWSER=/path/to/chromium")
    assert BROWSER, "DYLORA_BROWSER_TESTS asks for these tests, and there is no chromium"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page of two tasks, one of them hostile, three methods and an average."""
    directory = tmp_path_factory.mktemp("report")
    runs = []
    for task in ("rte", HOSTILE):
        for k, (sampling, seeds) in enumerate([("example", 2), ("step", 1), ("fixed", 1)]):
            for seed in range(seeds):
                values = [0.60, 0.62 + 0.01 * k, 0.63, 0.631 + 0.002 * seed]
                rows = [
                    RankRow(b, {"combined_score": v, "accuracy": v, "f1": v}, 1 / b, 40_430, 73_728 * b)
                    for b, v in zip((1, 2, 4, 8), values, strict=True)
                ]
                runs.append(
                    RankResults(
                        task, f"method <{k}>", "combined_score", {"validation": rows}, {"validation": 0.62},
                        Choice(4, "smallest rank within one standard error of the best (rank 8)", 0.63, 0.002, "validation"),
                        seed=seed, sampling=sampling, max_rank=8, command=f"dylora train --task_name '{HOSTILE}'",
                        versions={"torch": "2.13.0"}, model_name_or_path="roberta-base",
                    )
                )  # fmt: skip
    write_report(runs, directory)
    return directory / "report.html"


def opened(browser, report, width=1280, scheme="light"):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.mistakes = []
    page.on("pageerror", lambda error: page.mistakes.append(str(error)))
    page.on("console", lambda line: page.mistakes.append(line.text) if line.type == "error" else None)
    page.goto(report.as_uri())
    page.wait_for_selector("#plot .mark")
    return page


def contrast(page, selector):
    """The contrast of a text with the page behind it, by WCAG's formula."""
    colours = page.eval_on_selector(
        selector, "e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
    )

    def luminance(text):
        parts = [int(v) / 255 for v in re.findall(r"\d+", text)[:3]]
        red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted(map(luminance, colours), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_can_be_read(browser, report, width, scheme):
    page = opened(browser, report, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.hurt") is None and not page.mistakes and page.locator("img").count() == 0
    for table in page.locator("table").all():
        box = table.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    for selector in ("h1", "p", ".soft", "td", "th button", "dt"):
        assert contrast(page, selector) >= 4.5, selector
    # the text of the picture is as large as it says, whatever the width
    assert page.eval_on_selector("#plot text", "e => e.getBoundingClientRect().height") >= 12
    page.close()


def test_what_was_found_and_how_is_told(browser, report):
    page = opened(browser, report)
    text = page.inner_text("main")
    for wanted in ("AURAC 62.00", "selected rank 4: smallest rank within one standard error of the best (rank 8)",
                   "dylora train --task_name", "torch 2.13.0", "roberta-base"):  # fmt: skip
        assert wanted in text, wanted
    assert page.locator("tr.selected").first.locator("td").first.inner_text() == "4"
    page.close()


def test_the_ticks_are_round(browser, report):
    page = opened(browser, report)
    ticks = [text for text in page.locator("#plot text").all_text_contents() if re.fullmatch(r"[\d.]+", text)]
    values = [float(text) for text in ticks if "." in text or float(text) > 8]
    assert len(values) >= 3
    step = values[1] - values[0]
    assert round(step / 10 ** math.floor(math.log10(step)), 6) in (1, 2, 5)
    assert all(abs(v / step - round(v / step)) < 1e-6 for v in values)
    page.close()


def test_curves_differ_in_shape_too(browser, report):
    page = opened(browser, report)
    shapes = {path.get_attribute("d") for path in page.locator("#legend path").all()}
    assert len(shapes) == page.locator("#legend label").count() == 3
    page.close()


def test_all_of_it_works_with_the_keyboard(browser, report):
    page = opened(browser, report)
    mark = page.locator("#plot .mark").first
    mark.focus()
    assert page.get_attribute("#note", "aria-live") == "polite"
    said = page.inner_text("#note")
    assert said == mark.get_attribute("aria-label") and "rank 1, 60.00" in said and "(2 seeds)" in said
    page.keyboard.press("Tab")
    assert page.inner_text("#note") != said and "rank 2" in page.inner_text("#note")
    box = page.locator("#legend input").first
    box.focus()
    before = page.locator("#plot .mark").count()
    page.keyboard.press("Space")
    assert (
        page.locator("#plot .mark").count() == before - 4 and page.evaluate("document.activeElement.checked") is False
    )
    page.select_option("#task", index=1)
    assert page.locator("#plot .mark").count() == before  # every curve of the other task is shown
    page.close()


def test_a_table_is_sorted_by_its_buttons_and_says_so(browser, report):
    page = opened(browser, report)
    head = page.locator("table").first.locator("th")
    button = head.nth(4).locator("button")
    assert button.inner_text() == "loss"
    first = page.locator("table").first.locator("tbody tr td:first-child")
    button.press("Enter")
    assert head.nth(4).get_attribute("aria-sort") == "ascending" and first.all_inner_texts() == ["8", "4", "2", "1"]
    button.press("Enter")
    assert head.nth(4).get_attribute("aria-sort") == "descending" and first.all_inner_texts() == ["1", "2", "4", "8"]
    assert [head.nth(i).get_attribute("aria-sort") for i in (0, 1)] == ["none", "none"]
    page.close()
