"""A study as a value: arms and seeds."""

from lab.study.design.arms import Stack, Study, factorial, grid, leave_one_out, one_at_a_time

__all__ = ["Stack", "Study", "factorial", "grid", "leave_one_out", "one_at_a_time"]
