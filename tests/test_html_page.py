"""Pages held against the rules of HTML, with names that try to leave their place."""

from logitstore.figure import Figure, Table
from logitstore.html_page import Facts, Section, page
from tests.test_plots import HOSTILE, Parsed, assert_good, every_figure, svgs


def test_a_page_is_one_file_of_balanced_tags_that_asks_nobody_for_anything() -> None:
    parts: list[Figure | Table | Facts] = [*every_figure(), Table(("a", "b"), (("c", "1"),)), Facts((("d", "2", "e"),))]
    text = page("title", "subtitle", [Section("part", parts, "remark")])
    assert_good(text)
    tags = dict(Parsed(text).tags)
    assert tags["html"] == {"lang": "en"} and {"main", "h1", "h2", "figcaption", "dl"} <= tags.keys()
    assert len(svgs(text)) == 3 and "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_hostile_names_stay_text() -> None:
    parts: list[Figure | Table | Facts] = [Table((HOSTILE,), ((HOSTILE,),)), Facts(((HOSTILE, HOSTILE, HOSTILE),))]
    parts += every_figure(HOSTILE)
    text = page(HOSTILE, HOSTILE, [Section(HOSTILE, parts, HOSTILE)])
    assert_good(text)
    text.encode()  # no lone surrogates
    assert "alert(1)" in Parsed(text).text and not any(c in text for c in "\x00\x1b\u202e")
