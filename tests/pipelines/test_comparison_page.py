"""A comparison as Markdown, as LaTeX and as a page."""

from __future__ import annotations

import re

import pytest

import recordings
from setwise.pipelines import compare, comparison_page
from setwise.pipelines.compare import SideBySide, System


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> SideBySide:
    store = tmp_path_factory.mktemp("store")
    recordings.three_and_two(store)
    recordings.trained(store, "none", "note: '<b>& 50% #1_a</b>'\n")
    return compare.side_by_side([System.of(name, store) for name in ("k1", "k4", "none")])


def test_markdown_has_a_table_of_equal_rows_and_the_notes(compared: SideBySide) -> None:
    lines = comparison_page.markdown(compared).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 2 * 7
    assert {line.count("|") for line in table} == {10}
    assert re.fullmatch(r"\|  \|  \| k4 \| 2/2 \| .* ± .* \| \+.* \| \[\+.*, \+.*\] \| <?\.\d+ \| ▲ \|", table[3])
    assert "- not measured of none: digits\\_5k, digits\\_extended. Do so: setwise eval none" in lines
    assert any("\\<b\\>" in line for line in lines)


def test_latex_is_balanced_and_escaped(compared: SideBySide) -> None:
    text = comparison_page.latex(compared)
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert body[0] == r"\begin{tabular}{lllrrrrrr}" and body[-1] == r"\end{tabular}"
    rows = [line for line in body if line.endswith(r"\\")]
    assert len(rows) == 1 + 2 * 7
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {8}
    assert sum(line == r"\midrule" for line in body) == 2, "below the head and between the benchmarks"
    assert r"digits\_extended" in text and r"$\blacktriangle$" in text and r"$\pm$" in text
    assert "".join(body).isascii()


def test_a_minus_is_one_and_a_dash_is_one() -> None:
    assert comparison_page._tex("k1-seed0 [-1.5, -0.2]") == "k1-seed0 [$-$1.5, $-$0.2]"


def test_the_page_needs_nothing_from_elsewhere_and_escapes_names(compared: SideBySide) -> None:
    page = comparison_page.html(compared)
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not re.search(r"https?:|src=|url\(|@import|<script|<link", page)
    assert "<b>" not in page and "&lt;b&gt;&amp; 50%" in page
    assert page.count("<svg") == 7 and page.count("▲") == 7 + 1


def test_an_interval_is_drawn_where_its_numbers_say(compared: SideBySide) -> None:
    for group, benchmark in zip(comparison_page._groups(compared), ("digits_5k", "digits_extended"), strict=True):
        assert group["benchmark"] == benchmark
        lines = [line for line in compared.lines if line.benchmark == benchmark]
        for line, row in zip(lines, group["rows"][1::2], strict=True):
            one, drawn = line.cells[1].difference, row["drawn"]
            assert one is not None
            assert drawn["high"] == pytest.approx(98), "the widest end of its metric"
            assert (drawn["value"] - 50) / (drawn["high"] - 50) == pytest.approx(one.value / one.high)
            assert (drawn["low"] - 50) / (drawn["high"] - 50) == pytest.approx(one.low / one.high)
        assert {row["drawn"] for row in group["rows"][::2]} == {None}
