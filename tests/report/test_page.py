import json
import re
from html.parser import HTMLParser

import pytest
from plotly import graph_objects

from capgap.law import fit_law
from capgap.report.interactive import curve_plot, law_plot, loss_plot, roles_plot
from capgap.report.page import Figure, Table, write_page
from capgap.report.rows import observations_of, role_bars

from .made_up import others, record, study

VOID = {"meta", "link", "br", "img", "input", "hr"}
NASTY = "</script><script>alert(1)</script>{{body}}&\u2028"


class Reader(HTMLParser):
    """Checks that tags close in order, and gathers text, ids and what would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.scripts, self.fetched, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


def test_a_page_is_whole_and_fetches_nothing(tmp_path):
    plot = law_plot(fit_law(observations_of(study()), replicates=50), {})
    rows = [{"a": "1.5", "b": "x"}]
    sections = [Figure("The law", plot, "a caption"), Table("Rows", rows), Table("None", [])]
    path = write_page(tmp_path / "sub" / "p.html", title="T", lead="L", statements=["S"], sections=sections)
    page = read(path)
    assert page.fetched == ["data:,"]
    words = " ".join(page.text)
    assert all(word in words for word in ("The law", "a caption", "Rows", "1.5", "nothing to show"))
    assert len(page.scripts) == 2
    assert len(page.scripts[0]) > 1_000_000
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert 'name="viewport"' in text
    assert list(path.parent.iterdir()) == [path]


def test_no_text_can_break_out_of_the_page(tmp_path):
    plot = {"data": [{"type": "scatter", "name": NASTY}], "layout": {}}
    path = write_page(
        tmp_path / "p.html", title=NASTY, lead=NASTY, statements=[NASTY],
        sections=[Figure(NASTY, plot, NASTY), Table(NASTY, [{NASTY: NASTY}], NASTY)],
    )  # fmt: skip
    page = read(path)
    assert page.tags.count("script") == 2
    drawn = re.search(r"^draw\(\"figure-0\", (.*)\);$", page.scripts[1], re.MULTILINE)
    assert drawn is not None
    assert json.loads(drawn[1]) == plot
    assert "".join(page.text).count("alert(1)") == 10


def test_every_figure_is_one_that_plotly_knows():
    records = [*study(), *others()]
    observations = observations_of(records)
    for law in (fit_law(observations, replicates=50), fit_law(observations[4:10], replicates=0)):
        graph_objects.Figure(law_plot(law, {58_000: "<b>"}))
    law = fit_law(observations, replicates=50)
    for row in law.optima:
        graph_objects.Figure(loss_plot(row.student, observations, row))
    graph_objects.Figure(loss_plot(58_000, observations, None))
    graph_objects.Figure(curve_plot([r for r in records if r.student == "s58k"]))
    graph_objects.Figure(roles_plot(role_bars([r for r in records if r.student == "s58k"], law)))
    assert curve_plot([record("s58k", "t90k", curve=[])]) is None


def test_names_in_figures_are_escaped():
    nasty = record("s58k", "t90k").model_copy(update={"teacher": "<a href=x>", "start": "<a href=x>"})
    assert "<a" not in json.dumps(curve_plot([nasty]))
    assert "<a" not in json.dumps(roles_plot(role_bars([nasty], None)))


def test_numbers_that_json_lacks_are_refused(tmp_path):
    plot = {"data": [{"x": [float("nan")]}], "layout": {}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_page(tmp_path / "p.html", title="", lead="", statements=[], sections=[Figure("f", plot)])
    assert not (tmp_path / "p.html").exists()
