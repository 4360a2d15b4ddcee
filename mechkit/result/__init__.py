"""A labelled, immutable result: one number per cell and prompt, what it is compared with, and where it came from."""

from mechkit.result._cost import Cost as Cost
from mechkit.result._labels import Label as Label
from mechkit.result._result import Interval as Interval
from mechkit.result._result import Result as Result
from mechkit.result._top import TopCell as TopCell

for _public in (Cost, Interval, Result, TopCell):
    _public.__module__ = __name__  # where they are imported from, and pickled by
