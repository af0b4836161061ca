"""Reports in a real browser: requests, layout, light and dark, on a phone and on paper."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from support.browser import Browser
from support.launcher import Session, read_metrics
from support.report_runs import add_class_counts

# Text of a figure as rectangles (left, top, right, bottom), with that of the figure, in CSS pixels.
TEXTS = """[...document.querySelectorAll('figure svg')].filter(svg => svg.clientWidth).map(svg => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  return [svg.getAttribute('aria-label'), box(svg), [...svg.querySelectorAll('g[id*="-text_"]')].map(box)];
})"""
# Blocks that follow each other within the page or a section.
BLOCKS = """[...document.querySelectorAll('body, section, .folded, figure')].flatMap(parent => {
  const all = [...parent.children].map(e => [e.tagName, e.getBoundingClientRect()]);
  const boxes = all.filter(b => b[1].height);
  return boxes.slice(1).map((b, n) => [boxes[n][0], b[0], b[1].top - boxes[n][1].bottom]);
})"""
WIDTHS = "[document.documentElement.scrollWidth, innerWidth]"
CUT = """[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)
  .map(e => e.querySelector('table, svg').id)"""
TEXT_HEIGHT = """Math.min(...[...document.querySelectorAll('figure svg')].filter(svg => svg.clientWidth)
  .map(svg => 7 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width))"""  # of 7 points, in pixels
FOLDED = """[...document.querySelectorAll('summary')].map(e => {
  return [e.innerText, e.parentElement.nextElementSibling.querySelector('table').offsetHeight > 0];
})"""
COLORS = """(() => {
  const root = getComputedStyle(document.documentElement), found = {};
  for (const name of ['ink', 'paper', 'soft', 'grid', ...[...Array(7).keys()].map(n => 'series-' + n)])
    found[name] = root.getPropertyValue('--' + name).trim();
  const text = document.querySelector('figure svg g[id*="-text_"] g');
  return [found, getComputedStyle(document.body).backgroundColor, getComputedStyle(text).fill];
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def pages(
    session: Session, small_run: tuple[str, ...], trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The page of one run, that of several with long names and two settings, and that of many clients."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(trained, folder / "one")
    runs = ["one"]
    for method, alpha, seed in (
        *(("pfedmoe", "1.0", "0"), ("pfedmoe", "1.0", "1"), ("standalone", "1.0", "0")),
        *(("standalone", "1.0", "1"), ("pfedmoe", "0.3", "0"), ("standalone", "0.3", "0")),
    ):
        runs.append(f"several/{method}-{alpha}-{seed}")
        which = ("--algorithm", method, "--partition.alpha", alpha, "--seed", seed, "--run.dir", runs[-1])
        assert session(*small_run, *which, "--rounds", "3", cwd=folder).code == 0
    runs.append("several/unshared")
    which = ("--pfedmoe.share", "false", "--rounds", "3", "--run.dir", runs[-1])
    assert session(*small_run, *which, cwd=folder).code == 0
    runs.append("many")
    which = ("--clients", "60", "--data.samples", "1500", "--rounds", "2", "--run.dir", "many")
    assert session(*small_run, *which, "--model.pool", "mlp1,mlp2,mlp3,mlp4,mlp5", cwd=folder).code == 0
    for run in runs:
        add_class_counts(folder / run)
    found = {}
    for name in ("one", "several", "many"):
        result = session("report", name, "--out", f"report-{name}", cwd=folder, timeout=240)
        assert result.code == 0, result.err
        found[name] = folder / f"report-{name}" / "report.html"
    return found


def luminance(color: str) -> float:
    """Return the relative luminance of #rrggbb; WCAG 2."""
    parts = np.array([int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["one", "several", "many"])
@pytest.mark.parametrize("width", [400, 900, 1600])
def test_page_loads_nothing_and_nothing_overlaps(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.open(pages[name], width)
    browser.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    addresses = {address.partition(":")[0] for address in browser.requests}
    assert addresses <= {"file", "data"} and len([a for a in browser.requests if a.startswith("file")]) == 1
    assert browser.problems == []
    inner, window = browser.value(WIDTHS)
    assert inner <= window == width, "the page scrolls sideways"
    assert [step for step in browser.value(BLOCKS) if step[2] < -0.5] == [], "blocks overlap"
    if width == 1600:
        assert browser.value(CUT) in ([], ["table-partition"]), "only the widest table scrolls"
    figures = browser.value(TEXTS)
    assert len(figures) == browser.value("document.querySelectorAll('figure').length") >= 5
    assert browser.value(TEXT_HEIGHT) > 8, "text that is readable without zooming"
    for label, frame, texts in figures:
        assert len(texts) > (2 if label.startswith("Representations") else 4), label
        check_texts(label, np.array(frame), np.array(texts))


def check_texts(label: str, frame: np.ndarray, texts: np.ndarray) -> None:
    """Check that all texts are within the figure and none overlap; half a pixel is rounding."""
    inside = (texts[:, :2] >= frame[:2] - 0.5).all() and (texts[:, 2:] <= frame[2:] + 0.5).all()
    assert inside, f"{label}: text is cut off"
    low = np.maximum(texts[:, None, :2], texts[None, :, :2])
    high = np.minimum(texts[:, None, 2:], texts[None, :, 2:])
    common = np.clip(high - low - 0.5, 0, None).prod(axis=2)
    np.fill_diagonal(common, 0)
    assert common.max() == 0, f"{label}: texts overlap"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_pages_are_readable(
    browser: Browser, pages: dict[str, Path], scheme: str, tmp_path: Path
) -> None:
    browser.open(pages["one"], 1000, scheme)
    colors, behind, text = browser.value(COLORS)
    assert (luminance(colors["paper"]) > 0.9) == (scheme == "light")
    for painted, name in ((behind, "paper"), (text, "ink")):
        numbers = ", ".join(str(int(colors[name][n : n + 2], 16)) for n in (1, 3, 5))
        assert painted == f"rgb({numbers})", f"figures and page follow --{name}"
    paper = colors["paper"]
    assert contrast(colors["ink"], paper) > 10 and contrast(colors["soft"], paper) > 4.5
    assert min(contrast(colors[f"series-{n}"], paper) for n in range(7)) > 3
    browser.screenshot(tmp_path / "page.png")
    picture = matplotlib.image.imread(tmp_path / "page.png")[:, :, :3]
    common = np.median(picture.reshape(-1, 3), axis=0)
    assert np.allclose(common, [int(paper[n : n + 2], 16) / 255 for n in (1, 3, 5)], atol=0.02)


def test_printed_page_is_white(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    browser.open(pages["several"], 700, "dark", media="print")
    colors, _, _ = browser.value(COLORS)
    assert colors["paper"] == "#ffffff"
    inner, window = browser.value(WIDTHS)
    assert inner <= window, "tables fit on paper"
    browser.pdf(tmp_path / "page.pdf")
    written = (tmp_path / "page.pdf").read_bytes()
    assert written.startswith(b"%PDF-") and len(written) > 20_000


def test_folded_tables_are_open_on_paper(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"], 1000)
    folded = dict(browser.value(FOLDED))
    assert len(folded) >= 3 and "Configuration" in folded and not any(folded.values())
    browser.value("document.querySelector('details').open = true")
    assert sum(open for _, open in browser.value(FOLDED)) == 1, "the heading opens its table"
    browser.open(pages["one"], 1000, media="print")
    assert dict(browser.value(FOLDED)) == dict.fromkeys(folded, True)


def test_page_shows_the_measured_values(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"], 1000)
    facts = dict(
        browser.value("[...document.querySelectorAll('.facts div')].map(e => e.innerText.split('\\n'))")
    )
    last: dict[str, Any] = read_metrics(pages["one"].parents[1] / "one")[-1]
    assert facts["rounds"] == "3 of 3"
    assert facts["accuracy, round 3"] == f"{100 * last['accuracy']['mean']:.2f} %"
    assert facts["worst client"] == f"{100 * last['accuracy']['worst']:.2f} %"
    heading = browser.value("[...document.querySelectorAll('h2')].map(e => e.innerText)")
    assert heading == [
        "The run",
        "Data",
        "Convergence",
        "Clients",
        "By class",
        "Gates",
        "Models",
        "Cost",
        "Events",
    ]


def test_long_table_of_clients_is_searched(browser: Browser, pages: dict[str, Path]) -> None:
    """The page's policy allows this script alone, by its hash; without it the first rows are there."""
    browser.open(pages["many"], 1000)
    search = """(text => {
      const input = document.querySelector('input[data-table=clients]');
      input.value = text;
      input.dispatchEvent(new Event('input'));
      const rows = [...document.querySelectorAll('#table-clients tbody tr')], line = input.closest('.search');
      const clients = rows.map(row => row.cells[0].textContent);
      return [clients, line.querySelector('output').value, line.hidden];
    })"""
    assert browser.value(f"{search}('37')") == [["37"], "1 found", False]
    assert len(browser.value(f"{search}('MLP3')")[0]) == 12
    rows, said, _ = browser.value(f"{search}('')")
    assert len(rows) == 40 and said == "60 found, 40 shown" and browser.problems == []
    assert len([address for address in browser.requests if not address.startswith("data")]) == 1


def test_paper_figures_have_clear_edges(pages: dict[str, Path]) -> None:
    found = [path for page in pages.values() for path in (page.parent / "figures").glob("*.png")]
    assert len(found) >= 15
    for path in found:
        picture = matplotlib.image.imread(path)[:, :, :3]
        edges = (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:])
        assert all((edge > 0.99).all() for edge in edges), f"{path.name} is cut"
        assert (picture < 0.5).any(), f"{path.name} is empty"
