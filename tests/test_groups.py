"""What belongs together because it shares something."""

from __future__ import annotations

import pytest

from common.groups import connected


@pytest.mark.parametrize("keys, groups", [
    ([(), (), ()], [0, 1, 2]),
    ([("a",), ("b",), ("a",)], [0, 1, 0]),
    ([(1, "x"), (), (3,), ("x", "y"), (3, 3), ("y", 2), (2,)], [0, 1, 2, 0, 2, 0, 0]),     # through others
    ([("low",), ("high",), ("low", "high")], [0, 0, 0]),                                   # joined by the last
])
def test_each_is_called_after_the_first_of_its_group(keys, groups):
    assert connected(keys) == groups
