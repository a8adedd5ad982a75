"""Records that check themselves."""

from __future__ import annotations

import pytest

from distill.records import RowCounts


def test_no_row_vanishes_between_read_lost_and_kept() -> None:
    with pytest.raises(ValueError, match="5 rows were read, but 3 kept"):
        RowCounts(5, {"empty": 1}, 3)


def test_counts_of_stages_are_joined_by_reason() -> None:
    tasks, lessons = RowCounts(10, {"empty": 1, "repeated": 2}, 7), RowCounts(7, {"empty": 3, "too long": 1}, 3)
    assert tasks.then(lessons) == RowCounts(10, {"empty": 4, "repeated": 2, "too long": 1}, 3)


def test_a_stage_reads_what_the_one_before_it_kept() -> None:
    with pytest.raises(ValueError, match="kept 7 rows, but the next one read 6"):
        RowCounts(7, {}, 7).then(RowCounts(6, {}, 6))
