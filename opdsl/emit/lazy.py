"""Values with an entry per word, with what is one number per row left outside of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opdsl.emit.module import bare, number


@dataclass(frozen=True, slots=True)
class Scale:
    """const · Π up / Π down: a number per row; `up` and `down` are texts of [n] or plain numbers."""

    const: float = 1.0
    up: tuple[str, ...] = ()
    down: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        return not self.up and not self.down

    def __mul__(self, other: Scale) -> Scale:
        up, down = [*self.up, *other.up], [*self.down, *other.down]
        for x in list(up):
            if x in down:
                up.remove(x)
                down.remove(x)
        return Scale(self.const * other.const, tuple(sorted(up)), tuple(sorted(down)))

    def text(self) -> str:
        """One number per row, or one for all."""
        parts = [*([number(self.const)] if self.const != 1.0 or not self.up else []), *self.up]
        return " * ".join(parts) + "".join(f" / {x}" for x in self.down)

    def column(self) -> str:
        return number(self.const) if self.plain else f"column({self.text()})"


@dataclass(frozen=True, slots=True)
class Lazy:
    """scale · (value + shift): a value with entries, and what is left outside of it."""

    value: int
    scale: Scale = Scale()
    shift: str = ""  # one number per row; "" is 0


def combined(a: str, b: str, c: float) -> str:
    """a + c · b, either may be missing."""
    if not b:
        return a
    second = b if c == 1.0 else f"{number(c)} * ({b})"
    return f"{a} + {second}" if a else second


def negated(x: Lazy | str) -> Lazy | str:
    if isinstance(x, str):
        return f"(-{x})"
    return replace(x, scale=x.scale * Scale(-1.0))


def factor(text: str) -> Scale:
    """A number per row as a factor; a plain number goes into the constant."""
    try:
        return Scale(float(bare(text)))
    except ValueError:
        return Scale(1.0, (text,))


__all__ = ["Lazy", "Scale", "combined", "factor", "negated"]
