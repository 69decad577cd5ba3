"""Drives the LALR tables over tokens and builds a concrete tree.

Words are typed here: a word is the keyword of its spelling where the parser can shift that
keyword, else a NAME. Lark's contextual lexer asks less exactly (by the merged LALR state), so it
refuses `run r of m { student = "a" teacher = "b" }`; whatever it accepts has the same tree here,
which a test holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opdsl.syntax.grammar import Tables
from opdsl.syntax.keywords import TERMINALS
from opdsl.syntax.tokens import Token

END = "$END"
# Brackets are limited to 64 before parsing; this stops chains such as `- - - - …`.
MAX_STACK = 2000


class Node:
    """A node of the concrete tree: `data` is the grammar's rule or alias name."""

    __slots__ = ("children", "data", "end", "start")

    def __init__(self, data: str, children: list[Any], start: int, end: int):
        self.data, self.children, self.start, self.end = data, children, start, end


@dataclass(slots=True)
class Failure:
    """The parser stopped at `token` (None at the end of the file) with these states.

    `deep`: not because of the token, but because the stack has grown beyond `MAX_STACK`.
    """

    token: Token | None
    states: list[int]
    deep: bool = False


def run(
    tables: Tables, tokens: list[Token], starts: frozenset[int] = frozenset()
) -> Node | Failure:
    """The tree of the whole token list, or where and in which state the parser stopped.

    Words at the positions `starts` begin statements; they are never read as names, so that a
    statement without a value does not swallow the keyword of the next one.
    """
    actions, rules, end_state = tables.actions, tables.rules, tables.end
    states: list[int] = [tables.start]
    values: list[Any] = []
    spans: list[tuple[int, int]] = []
    for token in (*tokens, None):
        if token is None:
            type_ = END
        elif token.kind == "word":
            type_ = TERMINALS.get(token.text, "NAME")
            if token.at in starts:
                type_ = TERMINALS.get(token.text, "")
            elif type_ != "NAME":
                row = actions[states[-1]]
                if type_ not in row or ("NAME" in row and not _shifts(tables, states, type_)):
                    type_ = "NAME"
            token.type = type_
        else:
            type_ = token.type
        before = states.copy()  # reductions come before the parser sees that a token is wrong
        while True:
            action = actions[states[-1]].get(type_)
            if action is None:
                return Failure(token, before)
            if action >= 0:
                assert token is not None
                if len(states) > MAX_STACK:
                    return Failure(token, before, deep=True)
                states.append(action)
                values.append(token)
                spans.append((token.start, token.end))
                break
            rule = rules[-action - 1]
            size = rule.size
            if size:
                start, end = spans[-size][0], spans[-1][1]
                if start < 0:  # the first symbol matched nothing
                    start = next((s for s, _ in spans[-size:] if s >= 0), -1)
                if end < 0:
                    end = next((e for _, e in reversed(spans[-size:]) if e >= 0), -1)
                parts = values[-size:]
                del states[-size:], values[-size:], spans[-size:]
            else:
                start = end = -1
                parts = []
            children: list[Any] = []
            for i in rule.plan:
                if i < 0:
                    children.append(None)
                elif type(parts[i]) is not list:
                    children.append(parts[i])
                elif children:
                    children.extend(parts[i])
                else:  # lists grow at their right end and have one owner: no copy
                    children = parts[i]
            value: Any
            if rule.splice:
                value = children
            elif rule.expand and len(children) == 1:
                value = children[0]
            else:
                value = Node(rule.name, children, start, end)
            states.append(actions[states[-1]][rule.origin])
            values.append(value)
            spans.append((start, end))
            if token is None and states[-1] == end_state:
                return value
    raise AssertionError("the end of the file is always an error or an acceptance")


def accepts(tables: Tables, failure: Failure) -> frozenset[str]:
    """Terminals that the parser could shift next (reductions simulated, so this is exact)."""
    found = set()
    for terminal in tables.actions[failure.states[-1]]:
        if (terminal.isupper() or terminal == END) and _shifts(tables, failure.states, terminal):
            found.add(terminal)
    return frozenset(found)


def _shifts(tables: Tables, states: list[int], terminal: str) -> bool:
    stack = list(states)
    while True:
        action = tables.actions[stack[-1]].get(terminal)
        if action is None:
            return False
        if action >= 0:
            return True
        rule = tables.rules[-action - 1]
        if rule.size:
            del stack[-rule.size :]
        stack.append(tables.actions[stack[-1]][rule.origin])
        if terminal == END and stack[-1] == tables.end:
            return True
