"""Row passes for a GPU: everything with an entry per word of the vocabulary runs in generated kernels.

A pass is torch text as in `module.py`, in rounds. Numbers of a row, gathers and index sets stay
torch on [n] and [n, K]; what needs a sweep over V is collected and done by one kernel per round:

    round 1    log-sum-exps, online, and every sum that is Σ π (a combination of logits): in
               Σ π (log p − log q) the log-sum-exps are one number per row and stay outside
    round k    sums and maxima of anything else, once the numbers they read are known
    last       the cotangent, written over the student's logits (or into a bfloat16 buffer)

So a divergence in either direction reads the logits twice and writes them once, a Jensen–Shannon
divergence reads them three times. Ids with a cotangent of their own are evaluated in float32
before the last kernel and stored after it: no atomics, no rounding of what cancels.

`compiled` gives such a pass, `available` says whether one can run. Logits must be finite (heads
without padding rows), as in `fused.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdsl.emit.fused import is_dense
from opdsl.emit.module import GATHERS, Writer, _mangle, function_name, key, number
from opdsl.emit.triton_affine import Sums
from opdsl.emit.triton_exact import Logarithms
from opdsl.emit.triton_source import Body, Kernel, Leaf, Unsupported, leaf_of
from opdsl.ir.derive import FULL
from opdsl.ir.stages import Stage, Staged
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis, Info, Quantity

REDUCTIONS = ("sum_v", "max_v", "lse_v")


@dataclass(frozen=True)
class Generated:
    """name(d, r, like, w, out) as text, and the kernels it launches by number."""

    name: str
    text: str
    kernels: tuple[Kernel, ...]


def generate(staged: Staged, st: Stage) -> Generated:
    """The text of one row pass and its kernels. Raises Unsupported."""
    try:
        return Rows(staged, st).generated()
    except (KeyError, AssertionError, RecursionError) as problem:
        raise Unsupported(str(problem)) from problem


class Rows(Writer):
    """Writes one row pass."""

    def __init__(self, staged: Staged, st: Stage):
        super().__init__(staged, st)
        self.kernels: list[Kernel] = []
        self.round: dict[int, int] = {}
        self.wanted: dict[int, list[Node]] = {}  # round -> reductions its kernel computes
        self.tiles: dict[int, list[Node]] = {}  # round -> values it writes out
        self.sums = Sums(self)
        self.lse: dict[Leaf, str] = {}
        self.masses: list[Node] = []
        self.buffers = 0

    def generated(self) -> Generated:
        nodes = self.ordered()
        self.scored()
        for k in range(max(self.round.values(), default=0) + 1):
            for n in nodes:
                if self.round[n.id] == k:
                    self.statement(n)
            self.sweep(k)
        self.finish()
        name = function_name(self.staged.rows, self.st)
        head = [
            f"def {name}(d, r, like, w, out):",
            "    y = r['y']",
            "    n = y.numel()",
            "    v = d['student'].z.shape[1]",
        ]
        text = "\n".join([*head, *(f"    {line}" for line in self.lines)])
        return Generated(name, text, tuple(self.kernels))

    # -- rounds ------------------------------------------------------------------------------------
    def ordered(self) -> list[Node]:
        """All nodes of the pass, and the sums of dense cotangents; finds the round of each."""
        for n in self.st.imports:
            self.names[n.id], self.round[n.id] = f"r['{key(n)}']", 0
        if self.last:
            q = Quantity(Axis.TOK, "real", info=Info.STATE)
            for i, c in enumerate(self.staged.cotangents):
                if c.dense is not None and c.dense.q.axis is Axis.VOCAB:
                    self.masses.append(Node(-100 - i, "sum_v", (c.dense, FULL), (), q))
        self.logs = Logarithms(self.st.nodes, is_dense)
        self.swept = {leaf_of(n) for n in self.logs.nodes if n.op == "logp" and self._read_dense(n)}
        if self.last:
            self.swept |= {leaf_of(c.leaf) for c in self.staged.cotangents}
        for dist, t in list(self.swept):  # soundness is asked at temperature 1
            self.swept |= {(dist, 1.0)} if t != 1.0 else set()
        leaves = [c.leaf for c in self.staged.cotangents] if self.last else []
        nodes = [*self.logs.nodes, *(x for x in leaves if x not in self.logs.nodes), *self.masses]
        nodes = self.needed(nodes)
        for n in nodes:
            self.round[n.id] = self.round_of(n)
        return nodes

    def needed(self, nodes: list[Node]) -> list[Node]:
        """Without what only comparisons read that are made elsewhere."""
        s = self.staged
        roots = [*self.st.exports, *self.masses]
        if self.last:
            roots += [s.total, *(n for _, n in (*s.terms, *s.gates))]
            for c in s.cotangents:
                roots += [c.leaf, *c.roots, *(x for x, _ in c.at_sets)]
        read, stack = set(), roots
        while stack:
            n = stack.pop()
            if n.id not in read:
                read.add(n.id)
                other = self.logs.instead.get(n.id)
                stack += n.args if other is None else (other,)
        return [n for n in nodes if n.id in read]

    def round_of(self, n: Node) -> int:
        """How many kernels must have run before this is known (entries: can be computed)."""
        if n.op == "logp":
            return 1 if leaf_of(n) in self.swept else 0
        args = n.args if n.id not in self.logs.instead else (self.logs.instead[n.id],)
        below = max((self.round.get(a.id, 0) for a in args), default=0)
        x = n.args[0] if n.args else n
        if n.op in REDUCTIONS and is_dense(x):
            early = self.sums.plan(n)
            if early is not None:
                return max([1, *(self.round[r.id] for r in early)])
            self.wanted.setdefault(below, []).append(n)
            return below + 1
        if n.op in GATHERS and x.op != "logp" and is_dense(x):
            if x not in self.tiles.setdefault(below, []):
                self.tiles[below].append(x)
            return below + 1
        return below

    # -- statements ----------------------------------------------------------------------------------
    def _read_dense(self, leaf: Node) -> bool:
        """Whether a kernel reads its logits."""
        users = [n for n in self.logs.nodes if leaf in n.args]
        return super()._read_dense(leaf) or any(n.op not in GATHERS for n in users)

    def statement(self, n: Node) -> None:
        if n.op == "logp" or is_dense(n):
            return
        if n.id in self.logs.instead:
            self.names[n.id] = self.names[self.logs.instead[n.id].id]
            return
        if n.op in REDUCTIONS and is_dense(n.args[0]):
            if n.id not in self.names:
                self.names[n.id] = self.sums.text(n)
            return
        super().statement(n)

    def scored(self) -> None:
        """Leaves that are only gathered from: a served list stays what it is."""
        leaves = {leaf_of(n) for n in self.logs.nodes if n.op == "logp"} - self.swept
        for dist, t in sorted(leaves):
            if (dist, 1.0) not in self.swept or t != 1.0:
                self.lines.append(f"scored({self.where(dist)}, {number(t)})")

    @staticmethod
    def where(dist: str) -> str:
        return f"d['{_mangle(dist)}']"

    def body(self) -> Body:
        logits = lambda leaf: f"{self.where(leaf[0])}.z"  # noqa: E731
        return Body(self.names, self.outside, self.lse, logits, self.logs.instead)

    def outside(self, n: Node) -> str:
        """A tile that torch makes: a mask of ids, or values put at ids."""
        if n.op == "in_set":
            return f"mask({self.names[n.args[0].id]}, n, v)"
        return f"put({self.entry(n.args[0])}, {self.names[n.args[1].id]}, n, v)"

    def sweep(self, k: int) -> None:
        """The kernel after round k: everything that can be computed and is waited for."""
        body, found = self.body(), {}
        learnt = sorted(self.swept) if k == 0 else []
        if k == 0:
            self.sums.early(body, found, learnt)
        for n in self.wanted.get(k, []):
            x = body.value(n.args[0])
            if n.op == "lse_v":
                found[n.id] = body.online(x)[0]
            else:
                found[n.id] = body.sum(x) if n.op == "sum_v" else body.largest(x)
        for n in self.tiles.get(k, []):
            self.buffers += 1
            self.names[n.id] = f"w{self.buffers}"
            self.lines.append(f"w{self.buffers} = w({self.buffers})")
            body.write(f"w{self.buffers}", body.value(n))
        if not found and not self.tiles.get(k):
            return
        self.count += 1
        launched = f"x{self.count}"
        self.lines.append(f"{launched} = launch({self.add(body.kernel())})")
        names = {i: f"{launched}[{j}]" for i, j in found.items()}
        self.names.update({i: x for i, x in names.items() if isinstance(i, int)})
        if k == 0:
            self.sums.learn(names)
            for leaf in learnt:
                self.lse[leaf] = names["lse", ((leaf, 1.0),)]
                line = f"learn({self.where(leaf[0])}, {number(leaf[1])}, {self.lse[leaf]})"
                self.lines.append(line)

    def add(self, kernel: Kernel) -> str:
        """The arguments of a launch: number, tiles, numbers of rows."""
        self.kernels.append(kernel)
        tiles, rows = ", ".join(kernel.tiles), ", ".join(kernel.rows)
        return f"{len(self.kernels) - 1}, [{tiles}], [{rows}], y, v"

    # gathers from a value that was written out
    def _at_y(self, n: Node) -> str:
        x = n.args[0]
        if x.op == "logp":
            return super()._at_y(n)
        return f"{self.names[x.id]}.gather(1, y[:, None])[:, 0]"

    # -- what the pass returns -------------------------------------------------------------------------
    def finish(self) -> None:
        if not self.last:
            super().finish()
            return
        dz = self.cotangent() if self.staged.cotangents else "None"
        value = self.names[self.staged.total.id]
        self.lines.append(f"return {value}, {dz}, {{{self.extras()}}}")

    def cotangent(self) -> str:
        """∂L/∂z = Σ (g − (Σ g) π) / T over the leaves; ids apart."""
        cotangents = self.staged.cotangents
        at_ids = any(c.at_sets for c in cotangents)
        sparse, masses = [], []
        for i, c in enumerate(cotangents):
            at_y = self.names[c.at_y.id] if c.at_y is not None else "0.0"
            sets = ", ".join(f"({self.names[s.id]}, {self.entry(x)})" for s, x in c.at_sets)
            dense = "0.0"
            if c.dense is not None and c.dense.q.axis is Axis.VOCAB:
                dense = self.names[-100 - i]
            elif c.dense is not None:
                dense = f"v * {self.use(c.dense, Axis.TOK)}"
            self.count += 1
            masses.append(f"x{self.count}")
            self.lines.append(f"x{self.count} = mass({at_y}, [{sets}], {dense}, y, like)")
            sparse.append(f"({number(c.temperature)}, {at_y}, [{sets}])")
        if at_ids:
            self.lines.append(f"s0 = pieces([{', '.join(sparse)}], y, like)")
            body = self.body()
            kernel = body.points(self.entries(body, masses, False))
            self.lines.append(f"e0 = at_points(s0, {self.add(kernel)})")
        body = self.body()
        self.lines.append("z0 = d['student'].z if out is None else out")
        body.write("z0", self.entries(body, masses, not at_ids))
        self.lines.append(f"launch({self.add(body.kernel())})")
        if at_ids:
            self.lines.append("z0.scatter_(1, s0[0], e0.to(z0.dtype))")
        return "z0"

    def entries(self, body: Body, masses: list[str], with_y: bool) -> str:
        """The cotangent of one block, as the name of a value."""
        parts = []
        for c, mass in zip(self.staged.cotangents, masses):
            leaf = leaf_of(c.leaf)
            logp = body.let(c.leaf.id, f"{body.scaled(leaf)} - {body.row(self.lse[leaf])}")
            text = f"- {body.row(mass)} * tl.exp({logp})"
            text = f"{body.value(c.dense)} {text}" if c.dense is not None else f"-{text[2:]}"
            if with_y and c.at_y is not None:
                text = f"{text} + tl.where(col == {body.row('y')}, {body.value(c.at_y)}, 0.0)"
            parts.append(f"({text})" if c.temperature == 1.0 else f"({text}) / {c.temperature!r}")
        return body.let("cotangent", " + ".join(parts))
