"""The page: one file that loads nothing else, and what a real browser draws, light and dark, wide and narrow."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.exports import export
from helpers.masks import keep_first
from helpers.recoveries import write_run

pytest.importorskip("altair", reason="pgprune[report] is not installed")
pytest.importorskip("vl_convert", reason="pgprune[report] is not installed")

from pgprune_cli.jobs.search import search
from pgprune_cli.model.loading import load_prunable
from pgprune_cli.model.source import DEMO_MODEL, resolve
from pgprune_cli.report.figures import figures_of
from pgprune_cli.report.gather import kept_cells, read_run, read_runs, theta_cells
from pgprune_cli.report.page import page

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
OFFLINE_OPTIONS = (  # otherwise Chromium looks for updates
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Parts(HTMLParser):
    """Collect what the tags of a page refer to, its scripts, and the ids of its plots."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.scripts: list[str] = []
        self.plots: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        values = dict(attrs)
        self.references += [values[name] for name in ("src", "href", "srcset", "data", "action") if values.get(name)]
        if values.get("class") == "plot":
            self.plots.append(values["id"])

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


@pytest.fixture(scope="module")
def html(finished) -> str:
    return page(read_runs(list(finished.values())))


def test_the_page_refers_to_nothing_outside_itself(html) -> None:
    parts = Parts(html)
    assert parts.references == ["data:,"]
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in style
    assert "url(" not in style


def test_every_plot_has_an_element_and_a_specification(html, finished) -> None:
    parts = Parts(html)
    specs = json.loads(next(script for script in parts.scripts if script.startswith("{")))
    assert list(specs) == parts.plots
    assert len(set(parts.plots)) == len(parts.plots)
    families = ("attention", "ffn")
    common = [f"{kind}-{family}" for kind in ("width", "kept", "course") for family in families]
    of_units, of_widths = [f"theta-{family}" for family in families], ["sensitivity"]
    assert set(parts.plots) == {
        *("pareto-0", "pareto-1", "heldout", "run-0-loss", "run-1-loss"),
        *(f"run-0-{name}" for name in [*common, *of_units]),
        *(f"run-1-{name}" for name in [*common, *of_widths]),
    }


def test_a_run_whose_perplexity_exceeds_every_number_has_a_page(finished) -> None:
    whole, other = read_runs(list(finished.values()))
    rows = [*whole.rows[:-1], replace(whole.rows[-1], losses=[800.0], heldout_loss=900.0, heldout_objective=900.0)]
    decision = replace(whole.decision, heldout_loss=900.0, heldout_objective=900.0, dense_loss=750.0)
    html = page([replace(whole, rows=rows, decision=decision), other])
    assert "900.0000 nats per token, perplexity inf" in html
    specs = next(script for script in Parts(html).scripts if script.startswith("{"))
    assert "Infinity" not in specs
    assert '"loss":900.0,"perplexity":"∞"' in specs
    assert "pareto-1" not in json.loads(specs)  # the held-out perplexities: only one is a number


@pytest.fixture(scope="module")
def lacks_blocks(tmp_path_factory) -> Path:
    """The demo model, pruned: without the attention of its first layer and the FFN of its second."""
    pruned = tmp_path_factory.mktemp("pruned") / "model"
    model = load_prunable(resolve(str(DEMO_MODEL)), "float32", "cpu").module
    export(DEMO_MODEL, pruned, keep_first(model, [(0, 384), (4, 0), *[(4, 384)] * 4]))
    return pruned


@pytest.mark.parametrize("families", ["[attention, ffn]", "[attention-block, ffn-block]"])
def test_a_search_of_a_model_whose_layers_lack_blocks_has_a_page(families, lacks_blocks, small, tmp_path) -> None:
    search(small(f"model={lacks_blocks}", f"units.families={families}"), tmp_path / "run")
    run = read_run(tmp_path / "run", "it")
    attention, ffn = run.units.values()
    assert attention[0] == ffn[1] == 0 and all(attention[1:]) and sum(attention) + sum(ffn) == len(run.state.theta)
    for cells in (theta_cells(run), kept_cells(run)):
        empty = [[cell["layer"] for cell in row if cell["units"] == "none in this layer"] for row in cells.values()]
        assert empty == [[0], [1]]
    figures = json.loads(next(script for script in Parts(page([run])).scripts if script.startswith("{")))
    assert {f"run-0-{kind}-{family}" for kind in ("theta", "course") for family in run.units} < set(figures)


def test_a_number_that_json_cannot_hold_never_gets_into_a_page(finished) -> None:
    run = read_run(finished["units"], "it")
    run.state.theta[0] = float("nan")
    with pytest.raises(ValueError, match="JSON compliant"):
        page([run])


def test_text_from_a_run_is_escaped(finished, tmp_path) -> None:
    run = tmp_path / "<b>bold</b>"
    shutil.copytree(finished["units"], run)
    html = page(read_runs([run, finished["widths"]]))
    assert "<b>bold" not in html
    assert "&lt;b&gt;bold" in html


def test_a_page_about_a_running_search_reloads_itself(searching) -> None:
    runs = read_runs([searching])
    assert '<meta http-equiv="refresh" content="5">' in page(runs, reload_after=5)
    assert "http-equiv" not in page(runs)


def test_a_run_without_any_step_has_a_page(searching) -> None:
    shutil.rmtree(searching / "checkpoints")
    (searching / "metrics.jsonl").unlink()
    run = read_run(searching, "it")
    assert list(figures_of(run, "run")) == []
    assert "step 0 of 6" in page([run])


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no browser: chromium and chromedriver are not both on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *OFFLINE_OPTIONS):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser, file: Path, scheme: str, width: int) -> None:
    """Open the page and wait until all plots are drawn."""
    from selenium.webdriver.support.wait import WebDriverWait

    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(file.as_uri())
    WebDriverWait(browser, 60).until(lambda it: it.execute_script("return document.body.dataset.drawn"))


MARKS = """
return Object.fromEntries([...document.querySelectorAll(".plot")].map((plot) =>
  [plot.id, plot.querySelectorAll("svg .mark-rect path, svg .mark-line path, svg .mark-symbol path").length]))
"""


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_a_browser_draws_every_plot_without_messages_or_overflow(browser, html, tmp_path, scheme, width) -> None:
    file = tmp_path / "report.html"
    file.write_text(html)
    show(browser, file, scheme, width)
    marks = browser.execute_script(MARKS)
    assert set(marks) == set(Parts(html).plots)
    assert all(marks.values()), marks
    # a heat map has a rectangle per cell, and some for the legend
    assert marks["run-0-theta-ffn"] >= 6 * 48
    assert marks["run-0-kept-attention"] >= 6 * 4
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") == width


def test_the_plots_follow_a_change_of_the_theme(browser, html, tmp_path) -> None:
    file = tmp_path / "report.html"
    file.write_text(html)
    show(browser, file, "light", 1280)
    colour = "return getComputedStyle(document.querySelector('#run-0-loss svg .mark-line path')).stroke"
    light = browser.execute_script(colour)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 60).until(lambda it: it.execute_script(colour) != light)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", paper))) < 64


def test_a_cell_shows_its_layer_units_and_value_in_a_tooltip(browser, html, finished, tmp_path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    file = tmp_path / "report.html"
    file.write_text(html)
    show(browser, file, "light", 1280)
    cell = browser.find_elements(By.CSS_SELECTOR, "#run-0-theta-attention svg .mark-rect.role-mark path")[5]
    ActionChains(browser).scroll_to_element(cell).move_to_element(cell).perform()
    tooltip = browser.find_element(By.ID, "vg-tooltip-element")
    theta = float(read_run(finished["units"], "it").state.theta[5])
    assert re.sub(r"\s+", " ", tooltip.text) == f"layer 1 units KV head 1 θ {round(theta, 4):g}"


def test_a_page_about_recoveries_and_searches_shows_the_curves_of_both(finished, tmp_path) -> None:
    for name, steps in (("half", 5), ("whole", 10)):
        write_run(tmp_path / name, steps, finished=steps == 10)
    runs = read_runs([tmp_path / "half", tmp_path / "whole", finished["widths"]])
    html = page(runs)
    assert {"recoveries", "run-0-divergence", "run-0-rate", "run-1-divergence", "run-2-loss"} <= set(Parts(html).plots)
    assert [run.progress for run in runs] == ["step 5 of 10", "finished", "finished"]
    for fact in ("1.0500 nats per token, the best so far, at step 4", "0.7500 nats per token, the best, at step 10"):
        assert fact in html
    assert "pgprune recover models/pruned --teacher demo" in html


def test_a_recovery_before_its_first_row_has_a_page(tmp_path) -> None:
    write_run(tmp_path / "run", 0)
    (tmp_path / "run" / "training.jsonl").unlink()
    assert "step 0 of 10" in page(read_runs([tmp_path / "run"]))
