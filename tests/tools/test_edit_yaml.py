"""Editing single keys of a YAML file leaves the rest of its text alone."""

from __future__ import annotations

from tools.edit_yaml import remove_key, set_key


def test_a_value_changes_in_its_line_and_the_rest_stays_as_it_was():
    text = "# head\na:\n  b: 1  # one\n  # about c\n  c: [1,\n    2]\n\n# about d\nd:\n  e:\n    - x\n    - y\n"
    assert set_key(set_key(text, "a.c", 3, "three"), "d.e", "z", "now one") == (
        "# head\na:\n  b: 1  # one\n  # about c\n  c: 3                            # three\n\n# about d\nd:\n"
        "  e: z                            # now one\n"
    )


def test_a_key_that_is_not_there_goes_to_the_end_of_its_section():
    found = set_key(set_key("a:\n  b: 1\n# c\n\nd:\n  e: 2\n", "a.x.y", None, "why"), "f.g", 1)
    assert found == "a:\n  b: 1\n  x:\n    y: null                       # why\n# c\n\nd:\n  e: 2\n\nf:\n  g: 1\n"
    assert set_key("a:\n\nd: 2\n", "a.b", 1) == "a:\n  b: 1\n\nd: 2\n"
    assert set_key("", "a.b", True) == "a:\n  b: true\n"


def test_a_text_over_several_lines_is_replaced_whole():
    text = "a:\n  b: |\n    one\n    two\n  c: >-\n    three\n\nd: 4\n"
    assert set_key(set_key(text, "a.b", 1), "a.c", 2) == "a:\n  b: 1\n  c: 2\n\nd: 4\n"


def test_what_is_removed_takes_its_empty_section_along():
    text = "a:\n  b:\n    c: 1\n\nd: 2\n"
    assert remove_key(remove_key(text, "a.b.c"), "nothing.here") == "d: 2\n"
    assert remove_key(remove_key(text, "a.b.c"), "d").strip() == ""
    assert remove_key("a: 1\n\nb: 2\n\nc: 3\n", "b") == "a: 1\n\nc: 3\n"


def test_flow_style_is_written_out_where_it_has_to_be():
    found = set_key("# head\na: {b: 1e-3, c: 2}\n", "a.c", 3, "three")
    assert found == "# head\na:\n  b: 0.001\n  c: 3                            # three\n"
    nested = "a:\n  b: 1  # one\n  c: {d: 1, e: {f: 2}}  # goes\ng: {h: 1}\n"
    assert remove_key(nested, "a.c.e.f") == "a:\n  b: 1  # one\n  c:\n    d: 1\ng: {h: 1}\n"


def test_a_line_that_begins_with_a_hash_is_text_inside_of_a_block():
    text = "a:\n  b: |\n    one\n    # two\n# about c\nc: 1\n"
    assert set_key(text, "a.d", 2) == "a:\n  b: |\n    one\n    # two\n  d: 2\n# about c\nc: 1\n"
    assert set_key("a:\n  b: |\n    one\n    # two", "a.d", 2) == "a:\n  b: |\n    one\n    # two\n  d: 2\n"


def test_a_file_of_json_becomes_block_style():
    assert set_key('{"a": {"b": 1},\n "c": "x"}\n', "a.b", 2) == "a:\n  b: 2\nc: x\n"
    assert remove_key('{"a": {"b": 1}, "c": 2}\n', "a.b") == "c: 2\n"


def test_a_key_with_a_dot_of_its_own_is_given_by_its_parts():
    text = set_key("a:\n  b: 1  # one\n", ("a", "c/d.e"), {"f": 2})
    assert text == "a:\n  b: 1  # one\n  c/d.e:\n    f: 2\n"
    assert remove_key(text, ("a", "c/d.e")) == "a:\n  b: 1  # one\n"
