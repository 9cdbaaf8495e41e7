"""Words that messages share."""

from __future__ import annotations

from common.wording import some


def test_some_names_are_shown_and_the_others_counted():
    assert [some(list("abcd"), most) for most in (5, 4, 3)] == ["a, b, c, d", "a, b, c, d", "a, b, c and 1 more"]
    assert some(["x is missing", "y is missing", "z is missing"], 1, "; ") == "x is missing and 2 more"
