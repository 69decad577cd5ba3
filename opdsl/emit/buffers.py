"""Statements of a pass, and the buffers their values lie in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """A statement: `{0}`, `{1}` stand for values it reads, `{out}` for the buffer it writes."""

    text: str
    reads: tuple[int, ...] = ()
    out: int | None = None
    owned: str = ""  # the value lies here already (a tile of logits, a fresh tensor)
    pooled: bool = True  # whether that memory is ours to use again


def literal(line: str | Line) -> str:
    assert isinstance(line, str)
    return line.replace("{", "{{").replace("}", "}}")


def allocated(lines: list) -> list[str]:
    """Statements with buffers for their values: one dies with its last reader and is used again."""
    program = [Line(literal(x)) if isinstance(x, str) else x for x in lines]
    last = {v: i for i, line in enumerate(program) for v in (*line.reads, line.out) if v}
    place: dict[int, str] = {}
    owned: set[str] = set()
    free: list[str] = []
    count, out = 0, []
    for i, line in enumerate(program):
        reads = [place[v] for v in line.reads]
        for v in dict.fromkeys(line.reads):
            # an element is written after it was read: the buffer of a dying argument will do
            if last[v] == i and place[v] in owned and v != line.out:
                free.append(place[v])
                owned.discard(place[v])
        if line.out is None:
            out.append(line.text.format(*reads))
            continue
        if line.owned:
            place[line.out] = line.owned
            if line.pooled:
                owned.add(line.owned)
        else:
            if not free:
                count += 1
                free.append(f"w{count}")
                out.append(f"w{count} = w({count})")
            place[line.out] = free.pop()
            owned.add(place[line.out])
        out.append(line.text.format(*reads, out=place[line.out]))
        if last[line.out] == i and place[line.out] in owned:
            free.append(place[line.out])
            owned.discard(place[line.out])
    return out


__all__ = ["Line", "allocated", "literal"]
