"""Key slices: of the most important ones those that do not show the same, in the page as in DICOM."""

from pathlib import Path

from detect.report.pictures import set_key
from detect.report.tables import Entry, HealthyScores, Slice
from detect.scores import choose_key_slices


def test_key_slices_lie_apart():
    assert choose_key_slices([10.0, 13.9, 14.0, 6.0, 30.0]) == [0, 2, 3]        # 13.9 is too near to 10
    assert choose_key_slices([5.0, 5.6, 6.2]) == [0] and choose_key_slices([]) == []
    assert choose_key_slices([0.0, 3.995]) == [0, 1]                            # 4 mm, as headers round it


def test_key_slices_of_a_page_are_not_neighbours():
    """Three of 0.6 mm apart show the same."""
    scores = [1.0, 5.0, 9.0, 8.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0]
    slices = [Slice(k, 0.6 * k, True, score) for k, score in enumerate(scores)]
    entry = Entry("a", "ok", "", 9.0, None, None, 10, 10, None, None, [], slices,
                  {s.number: Path(f"{s.number}.png") for s in slices if s.number != 3})
    set_key(entry, HealthyScores([], None, None, None, []))
    assert [s.number for s in entry.key] == [2, 9]                              # 1 lies 0.6 mm from 2; 9, 4.2 mm
    set_key(entry, HealthyScores([1.0], None, None, None, [(0.6, 0.0, 0.0), (1.2, 0.0, 8.0), (5.4, 0.0, 0.0)]))
    assert [s.number for s in entry.key] == [1, 9]                              # by their rise: 5, and 3 at 5.4 mm
