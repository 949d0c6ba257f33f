"""The pages in headless Chromium: no error, every figure drawn with its labels, on a desktop and on a phone, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from progscale.report import compare, read_run, render_comparison, write_report
from tests.harness.browser import DESKTOP, browser, open_page
from tests.harness.reports import write_run

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's page, one of a run with everything, one of a run that has begun, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    records = [{"kind": "evaluation", "step": 30, "exact": 71.0, "f1": 0.5}]
    found = {"run": write_report(write_run(folder / "run"))}
    found["whole"] = write_report(write_run(folder / "whole", stage={"energy_joules": 3600.0}, records=records))
    begun = write_run(folder / "begun", finished=False)
    (begun / "metrics.jsonl").write_text("")
    found["begun"] = write_report(begun)
    runs = [
        write_run(folder / f"{name}-{seed}", schedule=name, seed=seed, score=score + seed / 100, sets=sets)
        for name, score, sets in (("none", 0.8, []), ("progtuning", 0.82, []), ("growing", 0.7, ["optimizer.lr=0.00012345"]))
        for seed in (1, 2, 3)
    ]
    found["compare"] = folder / "compare.html"
    found["compare"].write_text(render_comparison(compare([read_run(run) for run in runs])))
    return found


NAMES = ["run", "whole", "begun", "compare"]


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_drawn_with_labels(window: Any, pages: dict[str, Path], name: str) -> None:
    open_page(window, pages[name])
    figures = window.execute_script(
        """return [...document.querySelectorAll("figure")].map((figure) => {
            const svg = figure.querySelector(".plot > svg");
            const labels = svg ? [...svg.querySelectorAll('[aria-label$="axis label"]')].map((g) => g.textContent.trim()) : [];
            return {id: figure.id, title: figure.querySelector("h2").textContent, drawn: !!svg, labels,
                    marks: svg ? svg.querySelectorAll("rect, path, circle").length : 0,
                    shown: figure.querySelector(".plot").getAttribute("aria-label")};
        })"""
    )
    assert figures
    assert int(window.execute_script("return document.documentElement.dataset.drawn")) == len(figures)
    for figure in figures:
        assert figure["drawn"], figure
        assert figure["marks"] > 0, figure
        assert figure["labels"], figure
        assert all(figure["labels"]), figure
        wanted = 1 if figure["id"] == "time" or figure["id"].startswith(("score-", "difference-")) else 2
        assert len(figure["labels"]) == wanted, figure
    assert window.get_log("browser") == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wider_than_the_window(window: Any, pages: dict[str, Path], name: str) -> None:
    """What is wide scrolls inside its own frame."""
    open_page(window, pages[name])
    assert window.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    outside = window.execute_script(
        """const right = (element) => element.getBoundingClientRect().right;
        const figures = [...document.querySelectorAll("figure")];
        return figures.filter((figure) => right(figure.querySelector("svg")) > right(figure)).map((figure) => figure.id)"""
    )
    assert outside == []


@pytest.mark.parametrize("name", ["run", "compare"])
def test_text_stands_out_from_its_ground(window: Any, pages: dict[str, Path], name: str) -> None:
    """Contrast of at least 4.5 (WCAG AA) of what is read, in both colour schemes."""
    open_page(window, pages[name])
    contrasts = window.execute_script(
        """
        const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const ground = (element) => {
            for (let e = element; e; e = e.parentElement) {
                const found = numbers(getComputedStyle(e).backgroundColor);
                if (found.length === 3 || found[3] > 0) return found;
            }
        };
        const read = "h1, h2, .lead, .remark, .label, .value, .note, figcaption, th, td, .legend li, footer, summary";
        return [...document.querySelectorAll(read)]
            .map((e) => { const a = light(numbers(getComputedStyle(e).color)), b = light(ground(e));
                          return [e.className + e.tagName, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]; });
        """
    )
    assert len(contrasts) > 20
    assert [entry for entry in contrasts if entry[1] < 4.5] == []


def test_a_figure_is_drawn_anew_for_another_width(pages: dict[str, Path]) -> None:
    with browser(DESKTOP) as driver:
        open_page(driver, pages["run"])
        width = "return document.querySelector('#loss svg').getBoundingClientRect().width"
        before = driver.execute_script(width)
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 380, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        )
        driver.execute_async_script("const done = arguments[0]; setTimeout(done, 500)")
        assert driver.execute_script(width) < 380 < before
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 380
        assert driver.get_log("browser") == []


def test_values_are_told_on_hovering(pages: dict[str, Path]) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    with browser(DESKTOP) as driver:
        open_page(driver, pages["run"])
        figure = driver.find_element(By.CSS_SELECTOR, "#loss svg")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
        ActionChains(driver).move_to_element(figure).perform()
        driver.execute_async_script("const done = arguments[0]; setTimeout(done, 300)")
        tip = driver.execute_script("return document.querySelector('#loss [aria-label=tip]').textContent")
        assert "optimizer step" in tip


def test_without_scripts_the_tables_are_there(pages: dict[str, Path]) -> None:
    with browser(DESKTOP, scripts=False) as driver:
        driver.get(pages["run"].resolve().as_uri())
        text = driver.page_source
    assert "The figures need JavaScript" in text
    assert "frozen tensors changed" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_page_asks_for_nothing(window: Any, pages: dict[str, Path], name: str) -> None:
    """One file, and small."""
    open_page(window, pages[name])
    assert window.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    assert pages[name].stat().st_size < 1_000_000
