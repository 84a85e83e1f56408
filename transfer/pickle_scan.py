"""Look through a pickle's instructions, without following one, for what would fill the memory or never end."""

import pickletools
from typing import IO, Any

MOST_PARTS = 10_000
"""A tuple may hold so many parts, those of the tuples in it included: hashing one visits all, one call in another."""

_MARK = 0
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")


def complaint_about(file: IO[bytes]) -> str | None:
    """Look through the next pickle in `file`, up to its end.

    Returns:
        What is wrong with it; None if it may be followed.

    Raises:
        ValueError, IndexError: If it is damaged.
    """
    stack: list[int] = []  # Of each object that hashing visits as a whole the number of its parts, else 1.
    memo: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in _PUTS:
            index = len(memo) if argument is None else argument
            # Python makes room for as many objects as the highest number says; writers count from 0 or 1 on.
            if index > len(memo) + 1:
                return f"it numbers an object {index:,}, after {len(memo):,} others"
            memo[index] = stack[-1] or 1
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(argument, 1))
        elif opcode.name == "DUP":
            stack.append(stack[-1])
        else:
            taken = _take(stack, opcode)
            parts = 1 + sum(taken) if opcode.name in _TUPLES else 1
            if parts > MOST_PARTS:
                return f"it holds a tuple of more than {MOST_PARTS:,} parts"
            stack += [_MARK if after is pickletools.markobject else parts for after in opcode.stack_after]
    return None


def _take(stack: list[int], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Remove from the stack what the instruction takes, and return it."""
    before = list(opcode.stack_before)
    taken: list[int] = []
    if pickletools.markobject in before:
        while (top := stack.pop()) != _MARK:
            taken.append(top)
        before = before[: before.index(pickletools.markobject)]
    return taken + [stack.pop() for _ in before]
