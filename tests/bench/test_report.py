"""The page: whole, self-contained, and without a number that wasn't measured."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from minivllm_bench import plots, results
from minivllm_bench.compare_config import MODES
from minivllm_bench.findings import Findings
from minivllm_bench.points import empty_agent_run, empty_point
from minivllm_bench.published import PUBLISHED
from minivllm_bench.report import render, seconds, tokens, wait, write_report
from minivllm_bench.results import Comparison
from tests.bench import made_up

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements are closed as they were opened, and collects text, links and table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attributes)
        self.tags.add(tag)
        assert tag not in ("script", "link", "iframe", "img", "object", "embed")
        if tag == "a":
            self.links.append(values["href"] or "")
        else:
            self.loaded += [
                v for name, v in attributes if v and name in ("src", "href", "xlink:href", "data", "srcset")
            ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "svg" in self.open:
            return
        self.text += data
        if self.rows and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data

    def row(self, start: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == start)


def with_gaps() -> Comparison:
    """Failed, skipped and broken-off points, and a peer that failed."""
    comparison = made_up.comparison(
        *(made_up.contender(name) for name in ("paged", "contiguous", "sequential-1")),
        made_up.contender("peer", label="peer (some <model>)"),
    )
    paged, contiguous, sequential, peer = comparison["contenders"]
    paged["points"][0] = empty_point(1, failed="3 of 9 requests failed: HTTP 503: <busy>")
    contiguous["points"][-1] = empty_point(128, skipped="no time was left")
    contiguous["agents"][1] = empty_agent_run(8, 20, skipped="no time was left")
    sequential["agents"][0] = empty_agent_run(1, 20, failed="HTTP 500: oops")
    peer["failed"] = "the server ended"
    peer["points"] = [empty_point(1, failed="the server ended")]
    peer["points"] += [
        empty_point(users, skipped="the server had failed before") for users in made_up.USERS[1:]
    ]
    peer["agents"] = []
    return comparison


@pytest.fixture(scope="module")
def text() -> str:
    """Of the comparison that has everything."""
    return render(made_up.comparison())


def test_the_page_loads_nothing_and_links_only_to_sources(text: str) -> None:
    page = Page(text)
    assert all(reference.startswith("#") for reference in page.loaded)
    assert set(page.links) == {published.url for published in PUBLISHED if published.url is not None}
    assert all(link.startswith("https://") for link in page.links)
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)


def test_plots_refer_to_what_they_have(text: str) -> None:
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= ids
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= ids


def test_the_headline_is_made_of_measured_numbers(text: str) -> None:
    findings = Findings(made_up.comparison())
    ours, theirs = findings.throughput("paged", 50), findings.throughput("sequential-1", 50)
    assert ours is not None
    assert theirs is not None
    headline = findings.headline()
    assert headline.startswith("With 50 users at once, ")
    assert f"{ours:.0f} tokens a second" in headline
    assert f"{ours / theirs:.1f} times as many" in headline
    assert "ahead from 2 users on" in headline
    assert headline in Page(text).text


def test_without_50_users_the_headline_takes_the_most_that_both_have() -> None:
    comparison = made_up.comparison()
    for contender in comparison["contenders"]:
        contender["points"] = contender["points"][:5]
    assert Findings(comparison).headline().startswith("With 16 users at once, ")


@pytest.mark.parametrize("missing", ["paged", "sequential-1"])
def test_without_one_of_the_two_the_headline_compares_nothing(missing: str) -> None:
    rest = [name for name in made_up.SLOTS if name != missing]
    findings = Findings(made_up.comparison(*map(made_up.contender, rest)))
    assert "times" not in findings.headline()
    assert all(f"{findings.peak(name):.0f}" in findings.headline() for name in rest[:1])


@pytest.mark.parametrize(
    ("ahead", "words"),
    [
        (1.0, "from 1 user on"),
        (2.44, "from 2.4 users on"),
        (12.4, "from 12 users on"),
        (119.6, "from 120 users on"),
        (None, "at no number of users for good"),
    ],
)
def test_how_many_users_it_takes_to_be_ahead(
    monkeypatch: pytest.MonkeyPatch, ahead: float | None, words: str
) -> None:
    monkeypatch.setattr("minivllm_bench.findings.crossing", lambda curve, other: ahead)
    said = Findings(made_up.comparison()).crossing_words("paged", "sequential-1")
    assert said == f"ahead of {MODES['sequential-1'].label} {words}"


def test_every_number_in_the_key_table_was_measured(text: str) -> None:
    findings = Findings(made_up.comparison())
    page = Page(text)
    for users in made_up.USERS:
        expected = [tokens(findings.throughput(name, users)) for name in made_up.SLOTS]
        ratio = findings.ratio("paged", "sequential-1", users)
        assert page.row(str(users)) == [str(users), *expected, f"{ratio:.1f} ×"]


def test_what_failed_or_was_left_out_says_so_and_shows_no_number() -> None:
    comparison = with_gaps()
    page = Page(render(comparison))
    assert page.row("1")[1] == "failed"
    assert page.row("1")[4:] == ["failed", "–"]  # the peer, and the ratio
    assert page.row("128")[2] == "–"
    assert page.row("50")[4] == "–"
    assert "paged + continuous, 1 user: 3 of 9 requests failed: HTTP 503: <busy>" in page.text
    assert "contiguous + continuous, 128 users, 8 agents: no time was left" in page.text
    assert "sequential, 1 slot, 1 agent: HTTP 500: oops" in page.text
    assert "peer (some <model>) failed: the server ended" in page.text
    curve = Findings(comparison).curve("paged")
    assert 1 not in curve
    assert 2 in curve


def test_a_wait_longer_than_anybody_saw_is_no_number(text: str) -> None:
    known, unknown = made_up.waits(0.25), made_up.waits(60.0, longest=17.6)
    assert wait(known, "p50") == "0.25 s"
    assert wait(unknown, "p50") == "> 18 s"
    nobody = {"p50": None, "p90": None, "p99": None, "longest": None, "observed": 0, "waiting": 0}
    assert wait(nobody, "p50") == "–"  # type: ignore[arg-type]
    page = Page(text)
    details = [row for row in page.rows if len(row) == 13 and row[0] == "128"]
    assert [row[3] for row in details] == ["2.66 s", "> 20 s", "> 20 s", "> 20 s"]


def test_agents_that_were_broken_off_took_longer(text: str) -> None:
    page = Page(text)
    rows = [row for row in page.rows if row and row[0] == "sequential, 1 slot"]
    assert any(row[-2:] == ["43 s", "> 90 s"] for row in rows)
    assert any("> 90 sthe slowest had done 7 of 20 steps" in row for row in rows)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0123, "12 ms"), (0.0996, "0.10 s"), (1.234, "1.23 s"), (9.96, "10 s"), (83.2, "83 s")],
)
def test_times_for_people(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_published_figures_stand_beside_the_same_question_here(text: str) -> None:
    page = Page(text)
    rows = {row[0].split("\n")[0]: row for row in page.rows if len(row) == 3}
    for published in PUBLISHED:
        row = next(row for claim, row in rows.items() if claim.startswith(published.claim))
        assert published.source in row[0]
        assert row[1] == published.setting
        assert row[2] != "not measured"
    nothing = made_up.comparison(made_up.contender("contiguous"))
    assert all(published.here(Findings(nothing)) is None for published in PUBLISHED if published.url)


def test_published_multiples_are_those_of_the_figures_beside_them() -> None:
    checked = 0
    for published in PUBLISHED:
        pattern = r"([\d,]+)[a-z/ ]* against (?:about )?([\d,]+).*: ([\d.]+) ×"
        if match := re.search(pattern, published.claim):
            one, other, times = (float(number.replace(",", "")) for number in match.groups())
            digits = len(match[3].partition(".")[2])
            assert round(max(one, other) / min(one, other), digits) == times
            checked += 1
    assert checked == 4


def test_a_broken_off_comparison_with_nothing_in_it_is_a_page() -> None:
    comparison = made_up.comparison()
    comparison["is_complete"], comparison["seconds"] = False, None
    comparison["busy_processes"] = {"cc1plus (1)": 0.9}
    for contender in comparison["contenders"]:
        contender["points"], contender["agents"] = [], []
    page = Page(render(comparison))
    assert "Nothing was measured." in page.text
    assert "Broken off" in page.text
    assert "cc1plus (1) took 0.9 cores" in page.text
    assert "svg" not in page.tags


def test_the_key_plot_alone_is_an_image(tmp_path: Path) -> None:
    written = write_report(made_up.comparison(), tmp_path)
    assert [path.name for path in written] == ["report.html", "compare.svg"]
    root = ElementTree.parse(written[1]).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("viewBox") is not None


def test_a_plot_has_arrows_for_what_is_longer_and_nothing_for_what_is_missing() -> None:
    nothing = made_up.comparison(made_up.contender("paged"))
    nothing["contenders"][0]["points"] = [empty_point(1, failed="no")]
    assert plots.throughput(Findings(nothing)) is None
    assert plots.first_token(Findings(nothing)) is None
    one = made_up.comparison(made_up.contender("sequential-1"))
    known = [point for point in one["contenders"][0]["points"] if point["users"] < 8]
    arrows = plots.first_token(Findings(one))
    one["contenders"][0]["points"] = known
    no_arrows = plots.first_token(Findings(one))
    assert arrows is not None
    assert no_arrows is not None
    head = "stroke-linecap: round"  # of an arrow, in what matplotlib writes
    assert head in arrows
    assert head not in no_arrows


def test_equal_comparisons_give_equal_pages(text: str) -> None:
    assert render(made_up.comparison()) == text


def test_a_comparison_survives_its_file(tmp_path: Path) -> None:
    comparison = with_gaps()
    results.save(comparison, tmp_path / "compare.json")
    assert results.load(tmp_path / "compare.json") == json.loads(json.dumps(comparison))
    assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]
