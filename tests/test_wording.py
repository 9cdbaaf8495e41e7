"""Words that messages share."""

from __future__ import annotations

from common.wording import differing, some


def test_some_names_are_shown_and_the_others_counted():
    assert [some(list("abcd"), most) for most in (5, 4, 3)] == ["a, b, c, d", "a, b, c, d", "a, b, c and 1 more"]
    assert some(["x is missing", "y is missing", "z is missing"], 1, "; ") == "x is missing and 2 more"


def test_where_two_things_differ_is_told_in_short():
    before, now = {"model": {"size": 32, "fold": 1}, "held_out": ["a", "b"]}, {"model": {"size": 64, "fold": 1}}
    assert differing(before, now, "meta") == ["meta.model.size 32, now 64", 'meta.held_out ["a", "b"], now null']
    assert differing(before, before, "meta") == []
    assert differing("x" * 80, "y", "data") == [f'data "{"x" * 56}..., now "y"']
