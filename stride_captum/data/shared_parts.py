"""Recognition of the parts of a batch that all examples share, from two batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import bad_value
from .containers import Path, described, place_name, rows_of, same_values

if TYPE_CHECKING:
    from .batch import ExampleBatch


def shared_parts(first: ExampleBatch, second: ExampleBatch | None) -> Iterator[Path]:
    """Paths of the parts that all examples share, given two batches of a source.

    Raises:
        ValueError: A part is as long as there are examples and equal in both batches, which is ambiguous.
    """
    if second is None:
        return
    others, undecided = dict(second.parts()), []
    for path, part in first.parts():
        other = others.get(path)
        n, m = rows_of(part), rows_of(other)
        if first.declared(path) is not None or n is None or m is None:
            continue
        follows = n == len(first) and m == len(second)
        if n == m and not follows:
            yield path
        elif follows and n == m and same_values(part, other) and not same_values(part[:1], part[-1:]):
            undecided.append(path)
    everything_is_the_same = all(same_values(part, others.get(path)) for path, part in first.parts())
    if undecided and not everything_is_the_same:
        raise bad_value(
            first.argument,
            "show which parts of a batch have one row for each example",
            f"{described(dict(first.parts())[undecided[0]])} at {place_name(undecided[0])}, which has as "
            "many rows as there are examples and is the same in two batches",
            "Say which parts have one row for each example: batch=Batch(per_example=[...]).",
        )
