"""Files, imports and scopes: which name means which definition or method.

Imports stay under the root of the spec (its own folder, or the shipped specs when it lies there);
a path that is not found beside the importing file is looked up among the shipped specs, so a
copied spec keeps working.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from opdsl.codes import make
from opdsl.diagnostics import Diagnostic, Label, Report
from opdsl.resources import here, is_file, is_folder, resolved
from opdsl.source import Source
from opdsl.syntax import tree
from opdsl.syntax.recover import ANYTHING
from opdsl.wrapping import shortened

BUILTIN_NAMES = frozenset(
    [
        "student",
        "rollout",
        "initial",
        "reference",
        "data",
        "golden",
        "y",
        "v",
        "t",
        "A",
        "outcome",
        "verifier",
        "prompt",
        "position",
        "length",
        "step",
        "support",
        "full",
        "group",
        "others",
        "sequence",
        "batch",
        "same_position",
        "sampled",
        "i",
    ]
)
BUILTIN_FUNCTIONS = frozenset(
    [
        "log",
        "exp",
        "abs",
        "min",
        "max",
        "clip",
        "sg",
        "live",
        "normalize",
        "softmax",
        "sigmoid",
        "tanh",
        "special",
        "chance",
        "rank",
        "drawn",
        "mean",
        "sum",
        "std",
        "quantile",
        "sft",
        "tempered",
        "top",
        "top_p",
        "union",
        "intersection",
        "critic",
        "routed",
        "linear",
        "cosine",
        "constant",
    ]
)
RESERVED = BUILTIN_NAMES | BUILTIN_FUNCTIONS

MAX_IMPORT_DEPTH = 32
MAX_IMPORTS = 500
MAX_IMPORT_LINES = 100  # of one file


@dataclass(eq=False)
class Scope:
    """The names visible at the top level of one file."""

    source: Source
    defs: dict[str, tree.Def] = field(default_factory=dict)
    def_scopes: dict[str, Scope] = field(default_factory=dict)
    methods: dict[str, tuple[tree.Method, Scope]] = field(default_factory=dict)
    runs: dict[str, tree.Run] = field(default_factory=dict)
    parent: Scope | None = None

    def find_def(self, name: str) -> tuple[tree.Def, Scope] | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.defs:
                return scope.defs[name], scope.def_scopes.get(name, scope)
            scope = scope.parent
        return None

    def find_method(self, name: str) -> tuple[tree.Method, Scope] | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.methods:
                return scope.methods[name]
            scope = scope.parent
        return None

    def def_names(self) -> list[str]:
        names: list[str] = []
        scope: Scope | None = self
        while scope is not None:
            names += scope.defs
            scope = scope.parent
        return names


def closest(name: str, candidates: Iterable[str]) -> str | None:
    """The best did-you-mean, if any is near enough; of `t` and `T`, the one written like it."""
    pool: dict[str, list[str]] = {}
    for c in sorted(set(candidates)):
        pool.setdefault(c.lower(), []).append(c)
    near = difflib.get_close_matches(name.lower()[:80], list(pool), n=1, cutoff=0.6)
    if not near:
        return None
    return max(pool[near[0]], key=lambda c: sum(a == b for a, b in zip(c, name)))


Parse = Callable[[Source], tuple[tree.File | None, tuple[Diagnostic, ...]]]
Read = Callable[[Path, str], Source]


_DEF = re.compile(r"^def[ \t]+([A-Za-z_]\w*)", re.MULTILINE)


class Library(dict[str, tree.Def]):
    """The definitions of the standard library, each parsed when it is first looked up.

    Definitions start at the left margin, so a file is cut at every `def`; everything else is
    blanked, which keeps offsets and lines true.
    """

    def __init__(self, parse: Parse, report: Report):
        super().__init__()
        self._parse, self._report = parse, report
        self._where: dict[str, tuple[Source, int, int]] = {}
        self.sources: list[Source] = []

    def add(self, source: Source) -> None:
        self.sources.append(source)
        found = list(_DEF.finditer(source.text))
        for i, m in enumerate(found):
            end = found[i + 1].start() if i + 1 < len(found) else len(source.text)
            self._where[m.group(1)] = (source, m.start(), end)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def keys(self):
        return self._where.keys()

    def values(self):
        return [self[name] for name in self._where]

    def get(self, name: str, default=None):
        return self[name] if name in self._where else default

    def __missing__(self, name: str) -> tree.Def:
        source, start, end = self._where[name]
        text = source.text
        header = "opd 1"
        kept = header + "".join("\n" if c == "\n" else " " for c in text[len(header) : start])
        file, problems = self._parse(Source(source.name, kept + text[start:end], source.path))
        for d in problems:
            self._report.add(d)
        item = file.items[0] if file is not None and file.items else None
        assert isinstance(item, tree.Def), f"{source.name}: {name}"
        self[name] = item
        self.sources.append(item.span.source)
        return item


class Loader:
    """Loads a file and everything it imports, once each; reports, never raises.

    `parse` and `read` come from the syntax room; `shipped` is the folder of shipped specs.
    """

    def __init__(self, parse: Parse, read: Read, shipped: Path, report: Report):
        self.parse, self.read, self.shipped, self.report = parse, read, shipped, report
        self._files: dict[Path, Scope | None] = {}
        self._std: Scope | None = None
        self.root: Path | None = None
        self.lost: set[str] = set()  # words of what could not be read or imported

    # -- the standard library ------------------------------------------------------------
    def std(self) -> Scope:
        if self._std is None:
            library = Library(self.parse, self.report)
            for path in sorted((self.shipped / "std").glob("*.opd")):
                library.add(self.read(path, f"specs/std/{path.name}"))
            self._std = Scope(Source("std", ""), defs=library)
        return self._std

    # -- files ---------------------------------------------------------------------------
    def load_main(self, source: Source) -> tuple[Scope, tree.File | None]:
        path = resolved(Path(source.path)) if source.path else None
        self.root = self._root_of(path)
        file, problems = self.parse(source)
        for d in problems:
            self.report.add(d)
        scope = Scope(source, parent=self.std())
        if file is not None:
            self.lost |= file.lost
            self._fill(scope, file, path, (path,) if path else ())
        return scope, file

    def _display(self, path: Path) -> str:
        """A path as short as it can be said."""
        shipped = self.shipped.resolve()
        if shipped in path.parents:
            return f"specs/{path.relative_to(shipped).as_posix()}"
        cwd = here()
        return str(path.relative_to(cwd)) if cwd in path.parents else str(path)

    def _root_of(self, path: Path | None) -> Path:
        if path is None:
            return here()
        shipped = self.shipped.resolve()
        if shipped in path.parents:
            return shipped
        cwd = here()
        return cwd if cwd in path.parents else path.parent

    def _fill(
        self, scope: Scope, file: tree.File, path: Path | None, chain: tuple[Path, ...]
    ) -> None:
        if len(file.imports) > MAX_IMPORT_LINES:
            extra = file.imports[MAX_IMPORT_LINES]
            note = f"{len(file.imports)} imports, at most {MAX_IMPORT_LINES}"
            self.report.add(make("OPD009", extra.span, "this file imports too much", note))
            self.lost.add(ANYTHING)
        for imp in file.imports[:MAX_IMPORT_LINES]:
            self._import(scope, imp, path, chain)
        for item in file.items:
            name = item.name
            if name.name in RESERVED:
                self._shadow(name)
                continue
            if isinstance(item, tree.Def):
                self._declare(scope.defs, name, item)
            elif isinstance(item, tree.Method):
                if self._declare(scope.methods, name, (item, scope)):
                    continue
            else:
                self._declare(scope.runs, name, item)

    def _declare(self, table: dict, name: tree.Ident, item: object) -> bool:
        if name.name in table:
            first = table[name.name]
            first = first[0] if isinstance(first, tuple) else first
            self.report.add(
                make(
                    "OPD103",
                    name.span,
                    f"`{name.name}` is defined twice",
                    "second definition",
                    secondary=[Label(first.name.span, "first definition")],
                    helps=["rename one of them"],
                )
            )
            return False
        table[name.name] = item
        return True

    def _shadow(self, name: tree.Ident) -> None:
        self.report.add(
            make(
                "OPD102",
                name.span,
                f"`{name.name}` is a built-in name and cannot be redefined",
                "this name already has a meaning in every spec",
                helps=[f"choose another name, for example `my_{name.name}`"],
            )
        )

    def _import(
        self, scope: Scope, imp: tree.Import, path: Path | None, chain: tuple[Path, ...]
    ) -> None:
        names = {name.name for name in imp.names}
        target = self._locate(imp, path)
        if target is None:
            self.lost |= names
            return
        if target in chain:
            self.lost |= names
            names = " -> ".join(p.name for p in (*chain[chain.index(target) :], target))
            self.report.add(
                make(
                    "OPD114",
                    imp.target_span,
                    "these files import each other in a circle",
                    names,
                    helps=["move what both need into a third file"],
                )
            )
            return
        if len(chain) >= MAX_IMPORT_DEPTH or len(self._files) >= MAX_IMPORTS:
            self.lost |= names
            self.report.add(
                make("OPD114", imp.target_span, "imports nest too deeply", "the chain ends here")
            )
            return
        found = self._load(target, chain, imp)
        if found is None:
            self.lost |= names
            return
        for name in imp.names:
            method = found.methods.get(name.name)
            definition = found.defs.get(name.name)
            if method is not None:
                scope.methods[name.name] = method
            elif definition is not None:
                scope.defs[name.name] = definition
                scope.def_scopes[name.name] = found.def_scopes.get(name.name, found)
            elif name.name not in self.lost:  # else that file has an error where it stands
                self.lost.add(name.name)
                near = closest(name.name, [*found.methods, *found.defs])
                helps = [f"did you mean `{near}`?"] if near else []
                have = ", ".join(sorted([*found.methods, *found.defs])) or "nothing"
                self.report.add(
                    make(
                        "OPD115",
                        name.span,
                        f"{target.name} defines no `{name.name}`",
                        "not found in that file",
                        notes=[f"it defines: {have}"],
                        helps=helps,
                    )
                )

    def _locate(self, imp: tree.Import, path: Path | None) -> Path | None:
        if not imp.is_file:
            target = resolved(self.shipped / (imp.target.replace(".", "/") + ".opd"))
            if is_file(target):
                return target
            self._not_found(imp, [p.stem for p in self.shipped.rglob("*.opd")])
            return None
        text = imp.target
        base = path.parent if path is not None else here()
        target = resolved(base / text)
        roots = [r for r in (self.root, self.shipped.resolve()) if r is not None]
        if Path(text).is_absolute() or not any(r == target or r in target.parents for r in roots):
            inside = self._shipped(text)
            if not Path(text).is_absolute() and not is_file(target) and inside is not None:
                return inside
            self.report.add(
                make(
                    "OPD116",
                    imp.target_span,
                    "an import may not leave the folder of the spec",
                    "outside the folder of this spec",
                    helps=['copy the file beside this one and import it as "./name.opd"'],
                )
            )
            return None
        if is_file(target):
            return target
        inside = self._shipped(text)
        if inside is not None:
            return inside
        self._not_found(
            imp, [p.name for p in target.parent.glob("*.opd")] if is_folder(target.parent) else []
        )
        return None

    def _shipped(self, text: str) -> Path | None:
        """The one shipped file that a path means in a spec copied out of its folder."""
        parts = [p for p in Path(text).parts if p not in (".", "..")]
        inside = resolved(self.shipped.joinpath(*parts))
        if self.shipped.resolve() in inside.parents and is_file(inside):
            return inside
        if not parts or Path(text).is_absolute():
            return None
        found = [p for p in self.shipped.rglob("*.opd") if p.parts[-len(parts) :] == tuple(parts)]
        return resolved(found[0]) if len(found) == 1 else None

    def _not_found(self, imp: tree.Import, nearby: list[str]) -> None:
        stem = Path(imp.target).name
        near = closest(stem, nearby)
        there = near == stem  # a folder, a pipe, a link that leads nowhere
        helps = [f"a file of a close name: {near}"] if near and not there else []
        shipped = sorted(p.stem for p in self.shipped.glob("*.opd"))
        helps.append(
            'shipped specs are found from anywhere: import "./sampled_opd.opd" (sampled_opd)'
        )
        self.report.add(
            make(
                "OPD113",
                imp.target_span,
                f"cannot find {shortened(' '.join(imp.target.split()), 200)}",
                "this is not a file" if there else "no such file",
                notes=[f"shipped: {', '.join(shipped[:12])}"] if shipped else [],
                helps=helps,
            )
        )

    def _load(self, target: Path, chain: tuple[Path, ...], imp: tree.Import) -> Scope | None:
        if target in self._files:
            return self._files[target]
        self._files[target] = None
        from opdsl.diagnostics import CompileError

        try:
            source = self.read(target, self._display(target))
        except CompileError as e:
            for d in e.diagnostics:
                self.report.add(d)
            return None
        file, problems = self.parse(source)
        for d in problems:
            self.report.add(d)
        if file is None:
            return None
        self.lost |= file.lost
        scope = Scope(source, parent=self.std())
        self._fill(scope, file, target, (*chain, target))
        self._files[target] = scope
        return scope
