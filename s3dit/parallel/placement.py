"""Which rank computes what of a model call: items first, as far as they divide, then the tokens of each item.

A call of the transformer has items that know nothing of one another: pictures, and with guidance every picture again
with its negative prompt. Ranks are laid out as a grid of groups × ranks of a group. Each group has as many items, whose
tokens are split among its ranks: each item's image, and what else it has, into runs of equal length, give or take a
token, whatever the number of ranks. Only ranks of one group exchange keys and values. So guidance on 4 ranks is 2
groups of 2, four pictures on 4 ranks are a picture each, and a single item on 5 ranks is a fifth of its tokens each.

This room is arithmetic alone, without torch; `passes` cuts tensors by it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import gcd
from typing import Self

from s3dit.errors import RequestError

# How many times the mean the work of a group may be: a ragged batch is split by tokens, which is always even.
UNEVEN = 1.1
# The image and the caption of an item have at least as many tokens, so that each rank has one.
MOST_RANKS = 32


@dataclass(frozen=True, slots=True)
class Form:
    """What was asked for: the number of ranks, and in how many groups at most the items of a call are split."""

    size: int
    groups: int

    @classmethod
    def of(cls, given: int | str) -> Self:
        """Read a number of ranks, 4 or "4", or groups × ranks of a group, such as "2x2"; raises RequestError."""
        words = str(given).lower().replace("×", "x").split("x")
        if isinstance(given, bool) or len(words) > 2 or not all(word.isascii() and word.isdigit() for word in words):
            raise RequestError(
                f"parallel is {given!r:.80}; needed a number of processes such as 4, or groups × ranks of a group, 2x2"
            )
        groups, ranks = int(words[0]), int(words[-1])
        size = groups * ranks if len(words) == 2 else ranks
        if not 1 <= size <= MOST_RANKS:
            raise RequestError(f"parallel is {given!r:.80}, {size:,} processes; needed 1 to {MOST_RANKS}")
        return cls(size, groups)

    def __str__(self) -> str:
        """The form as `of` reads it."""
        return str(self.size) if self.groups == self.size else f"{self.groups}x{self.size // self.groups}"


def groups_of(form: Form, lengths: Sequence[int]) -> int:
    """In how many groups the items of a call with these lengths, in tokens, are split: 1 where they do not divide."""
    for groups in range(min(form.groups, len(lengths)), 1, -1):
        if gcd(form.size, len(lengths)) % groups == 0:
            each = len(lengths) // groups
            work = [sum(lengths[start : start + each]) for start in range(0, len(lengths), each)]
            if max(work) <= UNEVEN * sum(work) / groups:
                return groups
    return 1


def shares(length: int, ranks: int, before: int = 0) -> list[int]:
    """Split a run of tokens among ranks -> how many each has, a token more from rank `before` on, modulo ranks.

    Runs whose `before` is the sum of all lengths in front of them give every rank the same in all, within a token.
    """
    each, more = divmod(length, ranks)
    return [each + ((rank - before) % ranks < more) for rank in range(ranks)]


def runs(lengths: Sequence[int], form: Form, groups: int) -> Iterator[tuple[int, int]]:
    """Lay out one stream of a call's items: yield (rank, tokens) in the order of the stream."""
    ranks, each = form.size // groups, len(lengths) // groups
    for start in range(0, len(lengths), each):
        mine, first = lengths[start : start + each], start // each * ranks
        for length, before in zip(mine, accumulate(mine, initial=0), strict=False):
            yield from ((first + rank, count) for rank, count in enumerate(shares(length, ranks, before)))


def bounds(length: int, ranks: int) -> list[tuple[int, int]]:
    """Split rows of a picture among ranks -> the first row of each and the one behind its last."""
    return list(pairwise(accumulate(shares(length, ranks), initial=0)))
