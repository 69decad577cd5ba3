"""Random well-typed specs, as text: `spec(seed)` is a method of the language.

The generator knows the types it needs (a distribution, a number per token in nats, a gate, …) and
what the teacher of the method may be asked; it draws a spelling for each. `features` records
which parts of the language a text uses, so that a test can say what was covered.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import opdsl
from opdsl.diagnostics import CompileError
from opdsl.method import Method

TAILS = ("drop", "detach", "bin", "renormalize", "sampled")
AGGREGATES = (
    "sum(over = tokens)",
    "mean(over = tokens)",
    "mean(over = kept_tokens)",
    "mean(over = sequences)",
    "mean(over = response_length)",
)


@dataclass
class Text:
    """One generated method."""

    seed: int
    text: str
    teachers: tuple[str, ...]
    critics: tuple[str, ...]
    features: frozenset[str]


@dataclass
class Writer:
    """Draws spellings. `full`: the teacher gives its whole distribution."""

    r: random.Random
    teacher: str = "T"
    full: bool = True
    sampled_only: bool = False
    defs: list[str] = field(default_factory=list)
    params: list[str] = field(default_factory=list)
    lets: list[str] = field(default_factory=list)
    critics: list[str] = field(default_factory=list)
    features: set[str] = field(default_factory=set)
    count: int = 0
    detached: bool = False
    has_support: bool = True

    # -- plumbing ------------------------------------------------------------------------------
    def fresh(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def pick(self, *choices: object) -> str:
        """One of the choices; a choice may be a function that writes it."""
        chosen = self.r.choice(choices)
        return chosen() if callable(chosen) else str(chosen)

    def chance(self, p: float) -> bool:
        return self.r.random() < p

    def use(self, feature: str, text: str) -> str:
        self.features.add(feature)
        return text

    def num(self, low: float, high: float, unit: str = "") -> str:
        """A literal or a knob in [low, high]."""
        value = round(self.r.uniform(low, high), 2)
        value = min(max(value, low), high)
        if self.chance(0.3):
            name = self.fresh("knob_")
            kind = unit or "real"
            self.params.append(f"  param {name} : {kind} in [{low}, {high}] = {value}")
            return name
        return f"{value} {unit}".strip() if unit else f"{value}"

    def number(self, low: float, high: float) -> str:
        """A number that may move with the step."""
        if self.chance(0.2):
            a, b = (round(self.r.uniform(low, high), 2) for _ in range(2))
            kind = self.pick("linear", "cosine")
            over = self.pick("run", "7 steps", "20 steps")
            return self.use(f"schedule {kind}", f"{kind}({a} -> {b} over {over})")
        return self.num(low, high)

    # -- distributions ---------------------------------------------------------------------------
    def frozen(self) -> str:
        """A distribution without gradient, known where the teacher is."""
        t = self.teacher
        if not self.full or self.chance(0.6):
            return t
        return self.pick(
            lambda: self.use("initial", "initial"),
            lambda: self.use("tempered", f"tempered({t}, {self.num(0.5, 2.0)})"),
            lambda: self.use("mixture", f"({self.num(0.3, 0.9)} * {t} + 0.25 * initial)"),
            lambda: self.use("mixture", f"sg(0.8 * {t} + 0.2 * student)"),
            lambda: self.use("let", self.named_dist(f"0.5 * {t} + 0.5 * initial")),
        )

    def named_dist(self, text: str) -> str:
        name = self.fresh("Mix")
        self.lets.append(f"  let {name} = {text}")
        return name

    def target(self) -> str:
        """A target built from an index set: known on that set only, so on the full vocabulary."""
        t = self.teacher
        shape = self.pick(
            f"{t}[v] ^ {self.num(0.4, 1.6)} * initial[v] ^ 0.5",
            f"max({t}[v] - 0.05, 0)",
            f"exp({self.num(0.5, 2.0)} * log({t}[v]))",
        )
        self.features.add("normalized target")
        return self.named_dist(f"normalize(v in full: {shape})")

    def live(self) -> str:
        if self.chance(0.7):
            return "student"
        return self.pick(
            lambda: self.use("tempered", f"tempered(student, {self.num(0.6, 1.8)})"),
            lambda: self.use("mixture", f"(0.75 * student + 0.25 * {self.teacher})"),
            lambda: self.use("mixture", f"(0.6 * student + {self.num(0.1, 0.4)} * student)"),
        )

    def pair(self) -> tuple[str, str]:
        """Two distributions, one of them live."""
        sides = [self.live(), self.frozen()]
        self.r.shuffle(sides)
        return sides[0], sides[1]

    # -- index sets --------------------------------------------------------------------------------
    def plain_set(self, depth: int = 0) -> str:
        """A set without a tail rule."""
        k, t = self.r.randint(1, 5), self.teacher
        if self.sampled_only:
            return "sampled"
        if not self.full:
            return self.pick(f"top({k}, of = {t})", f"union(sampled, top({k}, of = {t}))")
        options: list[object] = [
            lambda: self.use("set top", f"top({k}, of = {t})"),
            lambda: self.use("set top", f"top({k}, of = student)"),
            lambda: self.use("set of a mixture", f"top({k}, of = 0.5 * {t} + 0.5 * student)"),
            lambda: self.use("set of a mixture", f"top({k}, of = tempered({t}, 2.0))"),
            lambda: self.use("set top_p", f"top_p({self.num(0.3, 0.95)}, of = {self.pick(t, 'student')}"
                             f"{self.pick('', ', at_most = 6')})"),
        ]  # fmt: skip
        if depth == 0:
            options += [
                lambda: self.use(
                    "set union",
                    f"union({self.pick('sampled', lambda: self.plain_set(1))}, {self.plain_set(1)})",
                ),
                lambda: self.use(
                    "set intersection", f"intersection({self.plain_set(1)}, {self.plain_set(1)})"
                ),
                lambda: self.use(
                    "set union", f"union(sampled, top({k}, of = {t}), top({k + 1}, of = student))"
                ),
            ]
        return self.pick(*options)

    def support(self, tail: str | None = None) -> str:
        """The value of a `support` section."""
        if self.sampled_only:
            return self.use("support sampled", "sampled")
        if self.full and tail is None and self.chance(0.4):
            return self.use("support full", "full")
        tail = tail or self.r.choice(TAILS)
        self.features.add(f"tail {tail}")
        return f"{self.plain_set()[:-1]}, tail = {tail})"

    # -- nats per token, live ------------------------------------------------------------------------
    def loss(self) -> str:
        if self.sampled_only:
            return self.sampled_loss()
        if self.full and self.chance(0.06):
            q = self.target()
            return self.pick(f"KL({q} || student, on = full)", f"TV(student || {q}, on = full)")
        return self.pick(
            self.divergence, self.divergence, self.divergence, self.own_divergence, self.user_def,
            self.sampled_loss, self.sum_of_losses,
        )  # fmt: skip

    def divergence(self) -> str:
        p, q = self.pair()
        name = self.r.choice(
            ("KL", "KL", "JSD", "skew_KL", "alpha_beta", "TV", "hellinger", "chi2", "power")
        )
        self.features.add(f"divergence {name}")
        if name == "chi2":
            q = "student" if p != "student" and self.chance(0.5) else self.teacher
            p = self.teacher if q == "student" else "student"
        extra = {
            "JSD": lambda: f", beta = {self.num(0.1, 0.9)}",
            "skew_KL": lambda: f", alpha = {self.num(0.1, 0.9)}",
            "alpha_beta": lambda: f", alpha = {self.num(0.2, 1.5)}, beta = {self.num(0.3, 1.0)}",
            "power": lambda: f", alpha = {self.num(0.3, 1.5)}",
        }.get(name, lambda: "")()
        if self.full and self.chance(0.15):
            extra += self.use("on = full", ", on = full")
        elif self.full and self.chance(0.1):
            extra += self.use("on = set", f", on = {self.support()}")
        return f"{name}({p} || {q}{extra})"

    def own_divergence(self) -> str:
        """Written by hand, inline."""
        p, q = self.pair()
        v = self.r.choice(("v", "w", "tok"))
        body = self.pick(
            f"{p}[{v}] * (log({p}[{v}]) - log({q}[{v}]))",
            f"-{q}[{v}] * log({p}[{v}])",
            f"{p}[{v}] * log({p}[{v}] / {q}[{v}])",
            f"abs({p}[{v}] - {q}[{v}]) ^ {self.num(1.0, 3.0)}",
            f"max({p}[{v}] - {q}[{v}], 0) * {self.num(0.5, 2.0)}",
            f"min({p}[{v}], {q}[{v}])",
            f"if {q}[{v}] > {p}[{v}] then {q}[{v}] - {p}[{v}] else {q}[{v}] * {p}[{v}]",
            f"tanh({p}[{v}] - {q}[{v}]) * {q}[{v}]",
            f"sigmoid(log({p}[{v}]) - log({q}[{v}])) * {q}[{v}]",
            f"exp({p}[{v}]) * {q}[{v}]",
            f"(if {v} == y then {self.num(0.5, 2.0)} else 1) * {p}[{v}] * {q}[{v}]",
        )
        how = self.pick("sum", "sum", "sum", "mean", "max", "min")
        self.features.add(f"reduce {how}")
        over = self.pick(
            "support", "support", "support", lambda: f"{{u in support: {self.filter('u')}}}"
        )
        return f"{how}({v} in {over}: {body})"

    def filter(self, v: str) -> str:
        t = self.teacher
        self.features.add("filtered set")
        return self.pick(
            f"{t}[{v}] > student[{v}]",
            f"{v} != y",
            f"student[{v}] >= {self.num(0.01, 0.2)}",
            f"not ({t}[{v}] < 0.05) and {v} != y",
            f"{t}[{v}] > 0.1 or student[{v}] > 0.2",
        )

    def user_def(self) -> str:
        name = self.fresh("my_rule_")
        self.features.add("user def")
        kind = self.r.randrange(5)
        if kind == 0:
            self.defs.append(
                f"def {name}(p : dist, q : dist, a : real in [0, 2] = 0.5) : nats per token\n"
                f'  "generated"\n  = a * sum(v in support: p[v] * (log(p[v]) - log(q[v])))'
                f" + (1 - a) * sum(v in support: q[v] * (log(q[v]) - log(p[v])))"
            )
            p, q = self.pair()
            return f"{name}({p} || {q}, a = {self.num(0.1, 0.9)})"
        if kind == 1:  # corrected f-divergence field, sampled
            self.defs.append(
                f"def {name}(p : dist, q : dist) : nats per token\n"
                "{\n  u = q[y] / p[y]\n  return 0.5 * log(u) ^ 2 + 0.1 * abs(u - 1)\n}"
            )
            return f"{name}({self.live()}, {self.frozen()})"
        if kind == 2:
            self.defs.append(
                f"def {name}(p : dist, q : dist) : nats per token\n"
                "{\n  m = 0.5 * p + 0.5 * q\n"
                "  a = sum(v in support: p[v] * (log(p[v]) - log(m[v])))\n"
                "  b = max(v in support: q[v] - p[v])\n  return a + (1 nats) * b ^ 2\n}"
            )
            p, q = self.pair()
            return f"{name}({p} || {q})"
        if kind == 3:
            self.defs.append(
                f"def {name}(p : dist) : nats per token\n"
                "  = -log(1e-6 + sum(v in support: p[v] * p[v]))"
            )
            return f"{name}({self.live()})"
        other = self.fresh("my_part_")
        self.defs.append(
            f"def {other}(x : nats per token, s : real = 1) : nats per token\n"
            f"  = if x > 0 then s * x ^ 2 else -s * x"
        )
        self.defs.append(
            f"def {name}(p : dist, q : dist) : nats per token\n  = {other}(log(p[y]) - log(q[y]), s = 0.3)"
        )
        return f"{name}({self.live()}, {self.frozen()})"

    def sampled_loss(self) -> str:
        self.features.add("sampled loss")
        q = self.frozen()
        p = self.live() if not self.sampled_only else "student"
        return self.pick(
            f"k2({p}, {q})",
            f"k3({p}, {q})",
            f"0.5 * logratio({p}, {q}) ^ 2",
            f"abs(logratio({p}, {q}))",
            f"-{q}[y] * log({p}[y])",
            f"tanh(logratio({p}, {q})) * logratio({p}, {q})",
            f"clip(logratio({p}, {q}), -1, 1) ^ 2",
            f"sg({p}[y] / {q}[y]) * k2({p}, {q})",
        )

    def sum_of_losses(self) -> str:
        self.features.add("sum of losses")
        return f"{self.number(0.2, 1.5)} * {self.divergence()} + {self.num(0.1, 1.0)} * {self.loss_part()}"

    def loss_part(self) -> str:
        return self.pick(
            self.divergence, self.sampled_loss, lambda: f"1 nats * {self.own_divergence()}"
        )

    # -- rewards -------------------------------------------------------------------------------------
    def reward(self) -> str:
        t, q = self.teacher, self.frozen()
        base = self.pick(
            f"logratio({q}, rollout)",
            f"logratio({q}, rollout)",
            f"logratio({q}, student)",
            f"log({q}[y]) - log(student[y])",
            f"{self.num(0.3, 2.0)} * logratio({t}, rollout)",
            f"-k2(student, {q})",
            f"-k3(student, {q})",
            f"-abs(logratio(student, {t}))",
            f"(log({t}[y]) - log(rollout[y])) / (1 + abs(logratio({t}, rollout)))",
            f"2 nats * ({t}[y] - student[y])",
        )
        if self.chance(0.15) and not self.sampled_only:
            base = self.use("state reward", f"-KL(student || {t})")
        if self.chance(0.2):
            base += self.use("outcome", f" + {self.num(0.1, 1.0)} * outcome")
        if self.chance(0.1):
            base = self.use("live length", f"({base}) / length")
        return base

    def shape(self) -> str:
        self.features.add("shape")
        if self.chance(0.2):
            name = self.fresh("shape_mine_")
            self.defs.append(
                f"def {name}(r : nats per token, s : real = 1.5) : nats per token\n"
                f"  = s * r / (1 + abs(r))"
            )
            return name.removeprefix("shape_") if self.chance(0.5) else name
        return self.pick("clip(-1, 1)", "clip(-2, 0.5)", "softlog", "tanh(2)", "power(0.5)", "identity",
                         "positive", "negative")  # fmt: skip

    def credit(self) -> str:
        value = self.credit_rule()
        name, _, args = value.partition("(")
        if self.chance(0.5):
            return value
        base = self.baseline()
        inner = args[:-1] if args else ""
        return f"{name}({inner}{', ' if inner else ''}baseline = {base})"

    def critic(self) -> str:
        if not self.critics or self.chance(0.2):
            name = self.fresh("Value")
            self.critics.append(name)
            self.lets.append(f"  let {name} : nats per token = critic(init = zero, lr = 0.01)")
        self.features.add("critic")
        name = self.r.choice(self.critics)
        return self.pick(name, name, f"min({name}, 0)", f"0.5 * {name}")

    def credit_rule(self) -> str:
        rule = self.r.choice(
            ("immediate", "return_to_go", "discounted", "window", "gae", "future_only",
             "full_return", "user", "user")
        )  # fmt: skip
        self.features.add(f"credit {rule}")
        if rule == "discounted":
            return f"discounted(gamma = {self.num(0.1, 1.0)})"
        if rule == "window":
            return f"window(n = {self.r.randint(1, 4)})"
        if rule == "gae":
            return f"gae(V = {self.critic()}, gamma = {self.num(0.5, 1.0)}, lam = {self.num(0.0, 1.0)})"
        if rule == "user":
            return self.user_credit()
        return rule

    def user_credit(self) -> str:
        name = self.fresh("my_credit_")
        body = self.pick(
            "G[t] = r[t] + c * G[t + 1]\n  return 0.5 * G + 0.5 * r",
            "G[t] = r + c * (G[t + 1] - r)\n  return G",
            "G[t] = if r > 0 then r + G[t + 1] else c * r\n  return G",
            "G[t] = 0.5 * r[t + 1] + c * G[t + 1] / 2\n  return r + G[t + 1]",
            "D[t] = r[t] - c * D[t + 1]\n  G[t] = D[t] + c * G[t + 1]\n  return G - G[t + 2]",
            "return r + c * (mean(i in group: r) - mean(t in sequence: r))",
            "return whiten(r) * c + r[t - 1]",
            "return r - c * mean(i in same_position: r)",
            "s = std(r) + 0.1\n  return clip(r / s, -c, c)",
            "d = if position == 0 then 0 else r[t - 1]\n  return r + c * d",
            "m = sum(t in sequence: r)\n  return c * r + (m - r) / max(length, 1)",
            "G[t] = r[t] + sigmoid(position - 2) * G[t + 1]\n  return G",
        )
        self.defs.append(
            f"def {name}(r : nats per token, c : real in [0, 1] = 0.7) : nats per token\n"
            "{\n  " + body + "\n}"
        )
        return f"{name}(c = {self.num(0.1, 1.0)})" if self.chance(0.5) else name

    def baseline(self) -> str:
        options = ["none", "batch_mean", "leave_one_out", "group_mean", "position"]
        if not self.sampled_only:
            options.append("kl_state")
        if self.chance(0.2):
            return self.use("baseline value", f"value(V = {self.critic()})")
        name = self.r.choice(options)
        return self.use(f"baseline {name}", name)

    def routing(self) -> str:
        kind = self.r.choice(("suppress", "drop", "proportional", "local", *["counterfactual"] * 3))
        if self.sampled_only and kind in ("local", "counterfactual"):
            kind = "drop"
        self.features.add(f"routing {kind}")
        t = self.teacher
        if kind == "local":
            if self.full and self.chance(0.5):
                return f"local(KL({t} || student), {self.support(self.pick('bin', 'renormalize'))})"
            return (
                f"local({self.pick('TV', 'hellinger') if self.detached else 'KL'}({t} || student))"
            )
        if kind != "counterfactual":
            return kind
        where = "full" if self.full and self.chance(0.2) else "support"
        when = self.pick("A < 0", "A + KL(student || " + t + ") < 0", f"A < -{self.num(0.0, 0.5)}",
                         f"A < 0 and {t}[y] < student[y]")  # fmt: skip
        among = self.pick(
            f"{{v in {where}: v != y and {t}[v] > student[v] and student[v] >= 0.01}}",
            f"{{v in {where}: {t}[v] > student[v]}}",
            f"{{v in {where}: v != y}}",
            f"{{v in {where}: not ({t}[v] <= 2 * student[v]) and v != y}}",
        )
        toward = self.pick(
            f"{t}[v] - student[v]",
            f"{t}[v]",
            "1",
            f"{t}[v] ^ 0.5 * student[v] ^ 0.5",
            f"max(log({t}[v]) - log(student[v]), 0) * student[v]",
        )
        strength = self.pick("-A", "min(5, -A)", f"min({self.num(0.5, 2.0)}, abs(A))", "abs(A)",
                             f"2 nats * max(student[y] - {t}[y], 0)")  # fmt: skip
        otherwise = self.pick("suppress", "proportional", "drop")
        self.features.add(f"otherwise {otherwise}")
        return (
            f"counterfactual(when = {when}, among = {among}, toward = {toward}, "
            f"strength = {strength}, otherwise = {otherwise})"
        )

    def scores(self) -> str:
        t = self.teacher
        return self.pick(
            f"log({t}[v]) - log(student[v])",
            f"clip(log({t}[v]) - log(student[v]), -2, 2) * student[v]",
            f"student[v] * (log({t}[v]) - log(student[v]))",
            f"{t}[v] - student[v]",
            f"if {t}[v] > student[v] then {t}[v] else 0",
        )

    def gap(self) -> str:
        name = self.fresh("my_gap_")
        self.defs.append(
            f"def {name}(p : dist, q : dist) : nats per token\n"
            "{\n  d = log(p[y]) - log(q[y])\n  return 0.5 * d[t + 1] + 0.1 * d[t - 1]\n}"
        )
        return name

    # -- gates and weights ---------------------------------------------------------------------------
    def gate(self, reward: bool) -> str:
        t = self.teacher
        options: list[Callable[[], str]] = [
            lambda: self.use("gate position", f"position < {self.r.randint(1, 4)}"),
            lambda: self.use("gate position", f"early({self.r.randint(1, 4)})"),
            lambda: self.use("gate special", "not special(y)"),
            lambda: self.use("gate outcome", self.pick("passed()", "failed()", "not passed()")),
            lambda: self.use("gate group", self.pick("all_failed()", "not all_passed()",
                             "mean(i in group: outcome) < 0.75")),
            lambda: self.use("gate log-ratio", f"abs(logratio(student, {t})) < {self.num(0.5, 2.0)}"),
            lambda: self.use("gate range", f"clip({self.number(0.2, 1.0)}, 0, 1)"),
            lambda: self.use("gate closed", "position < 0"),
            lambda: self.use("gate step", f"step >= {self.r.randint(0, 5)}"),
            lambda: self.use("gate live", f"live(sigmoid(log(student[y]) + {self.num(0.5, 2.0)}))"),
            lambda: self.use("gate length", "length > 1 or position < 2"),
            lambda: self.use("gate field", 'prompt.domain == "math"'),
        ]  # fmt: skip
        if self.full:
            options += [
                lambda: self.use("gate entropy", f"hesitant({t}, {self.num(1.0, 2.2)})"),
                lambda: self.use("gate entropy", f"confident(student, {self.num(1.0, 2.2)})"),
                lambda: self.use("gate quantile",
                    f"entropy(student) >= quantile(entropy(student), {self.num(0.2, 0.8)})"),
                lambda: self.use("gate overlap", f"overlap(student, {t}, k = 3) > {self.num(0.1, 0.6)}"),
                lambda: self.use("gate in top",
                    f"max(v in top(3, of = {t}): if v == y then 1 else 0) > 0"),
            ]  # fmt: skip
        if reward:
            options.append(
                lambda: self.use("gate sign", self.pick("A > 0", "A < 0", "not (A == 0)"))
            )
        return self.r.choice(options)()

    def weight(self, reward: bool) -> str:
        t = self.teacher
        options: list[Callable[[], str]] = [
            lambda: self.use("weight ratio", "ratio(student, rollout)"),
            lambda: self.use("weight ratio", f"truncated_ratio(student, rollout, cap = {self.num(1.0, 2.0)})"),
            lambda: self.use("weight position", "exp(-0.3 * position)"),
            lambda: self.use("weight group softmax", "softmax(i in group: perplexity(student))"),
            lambda: self.use("weight schedule", self.number(0.3, 1.0)),
            lambda: self.use("weight outcome", f"{self.num(0.2, 1.0)} + max(outcome, 0)"),
            lambda: self.use("weight live", "live(ratio(student, rollout))"),
            lambda: self.use("weight live coupled",
                "live(softmax(i in group: mean(t in sequence: log(student[y]))))"),
            lambda: self.use("weight live coupled",
                "live(1 / (1 + mean(-log(student[y]))))"),
            lambda: self.use("weight live coupled", f"live(abs(logratio(student, {t}))) "
                "/ (0.1 + max(i in group: sum(t in sequence: 1)))"),
            lambda: self.use("weight sequence", "1 / length"),
            lambda: self.use("weight drift",
                f"exp(-0.2 * sum(t in sequence: abs(logratio(student, {t}))))"),
            lambda: self.use("weight next token", f"exp(-abs({self.gap()}({t}, student)))"),
            lambda: self.use("weight group", "1 + mean(i in others: outcome) ^ 2"),
        ]  # fmt: skip
        if self.full:
            options += [
                lambda: self.use("weight entropy", f"entropy({self.pick(t, 'student')})"),
                lambda: self.use("weight entropy",
                    "entropy(student) / (0.1 + max(i in group: entropy(student)))"),
                lambda: self.use("weight live coupled",
                    "live(entropy(student) / (0.5 + mean(entropy(student))))"),
                lambda: self.use("weight overlap", f"overlap({t}, student, k = 2)"),
                lambda: self.use("weight target", f"1 + {self.target()}[y]"),
                lambda: self.use("weight quantile",
                    f"if quantile(sum(t in sequence: entropy(student)), 0.5) < 3 then 1 else "
                    f"{self.num(0.1, 0.9)}"),
                lambda: self.use("weight std", "1 / (0.5 + std(entropy(student)))"),
                lambda: self.use("weight batch", f"abs(KL(student || {t}, on = full)) / "
                    f"(0.1 + max(i in batch: abs(KL(student || {t}, on = full))))"),
            ]  # fmt: skip
        if self.has_support and not self.sampled_only:
            options.append(lambda: self.use("weight mass", "mass(student)"))
        if reward:
            options.append(
                lambda: self.use(
                    "weight ppo_clip", f"ppo_clip(student, rollout, eps = {self.num(0.1, 0.4)})"
                )
            )
        return self.r.choice(options)()

    # -- whole methods -------------------------------------------------------------------------------
    def body(self, indent: str, route: str | None = None) -> list[str]:
        """Sections of one term."""
        route = route or self.r.choice(("loss", "loss", "reward", "reward", "scores"))
        if self.sampled_only and route == "scores":
            route = "reward"
        self.features.add(f"route {route}")
        support = self.support(self.scores_tail() if route == "scores" else None)
        self.detached = "tail = detach" in support
        lines = [f"support {support}"]
        if route == "loss":
            # with the logarithm detached, only a live first factor has a gradient
            loss = f"KL({self.live()} || {self.frozen()})" if self.detached else self.loss()
            lines.append(f"feedback loss {loss}")
        elif route == "scores":
            lines.append(f"feedback scores {self.scores()}")
        else:
            lines.append(f"feedback reward {self.reward()}")
            if self.chance(0.35):
                lines.append(f"shape {self.shape()}")
            lines.append(f"credit {self.credit()}")
            if self.chance(0.7):
                lines.append(f"routing {self.routing()}")
        if self.chance(0.5):
            lines.append(f"gate {self.gate(route == 'reward')}")
        if self.chance(0.5):
            lines.append(f"weight {self.weight(route == 'reward')}")
        if self.chance(0.15):
            lines.append(f"weight {self.weight(route == 'reward')}")
        return [indent + line for line in lines]

    def scores_tail(self) -> str | None:
        return None if self.chance(0.4) else "drop"

    def regularizer(self) -> str:
        t = self.teacher
        return self.pick(
            lambda: self.use("regularize KL", "0.05 * KL(student || initial)"),
            lambda: self.use("regularize KL", "0.05 * KL(initial || student)"),
            lambda: self.use("regularize entropy", "-0.02 * H(student)"),
            lambda: self.use("regularize entropy", "-linear(0.1 -> 0 over run) * entropy(student)"),
            lambda: self.use("regularize outcome", "0.3 * outcome"),
            lambda: self.use("regularize sft", "0.1 * sft(data = golden)"),
            lambda: (
                self.use("regularize support", f"0.1 * TV(student || {t})")
                if self.full
                else "0.3 * outcome"
            ),
        )


USES = {  # shipped methods that can be a term, and how
    "sampled_opd": "sampled_opd({given}coef = 0.5)",
    "topk_match": "topk_match({given}k = 3)",
    "cr_opd": "cr_opd({given}k_teacher = 4, cap = 2)",
    "minillm": "minillm({given})",
    "sampled_rtg": "sampled_rtg({given})",
    "entropy_aware": "entropy_aware({given}tau = 1)",
}


def spec(seed: int) -> Text:
    """A generated method; the same seed gives the same text."""
    r = random.Random(seed)
    profile = r.choices(("logits", "routed", "top", "sampled"), (60, 12, 14, 14))[0]
    name = "T" if profile != "routed" else r.choice(("T", "Both"))
    w = Writer(r, name, profile in ("logits", "routed"), profile == "sampled")
    w.features.add(f"teacher {profile}")
    several = r.random() < 0.3
    terms: list[str] = []
    imports: list[str] = []
    if several:
        w.features.add("several terms")
        for i in range(r.randint(2, 3)):
            if r.random() < 0.25 and w.full:
                used = r.choice(sorted(USES))
                w.features.add("term use")
                imports.append(f'import "./{used}.opd" ({used})')
                given = (
                    f"T = {name}, " if USES[used].count(",") or "=" in USES[used] else f"T = {name}"
                )
                call = USES[used].format(given=given)
                terms.append(f"  term part{i} = {call}")
                w.has_support = False
                if r.random() < 0.5:
                    terms.append(f"  gate part{i}: {w.gate(False)}")
                if r.random() < 0.5:
                    terms.append(f"  weight part{i}: {w.weight(False)}")
                w.has_support = True
            else:
                terms.append(f"  term part{i} {{")
                terms += w.body("    ")
                terms.append("  }")
    else:
        terms += w.body("  ")
    regularizers = [f"  regularize {w.regularizer()}" for _ in range(r.choice((0, 0, 0, 1, 2)))]
    aggregate = r.choice(AGGREGATES)
    w.features.add(f"aggregate {aggregate}")
    sampler = r.choice(("", "", "", ", temperature = 0.9", ", top_p = 0.95"))
    state = f"rollouts(student, group = 2{sampler})"
    if "route reward" not in w.features and "term use" not in w.features and r.random() < 0.2:
        state = w.use("state mix", f"mix(0.5: {state}, 0.5: sequences(data))")
    access = {"top": "top(6)", "sampled": "sampled"}.get(profile, "logits")
    if profile == "routed":
        who = ("left", "right")
        teachers = [
            '  teacher left = external(access = logits) when prompt.domain == "math"',
            f"  teacher right = external(access = logits){r.choice((' when prompt.domain == ' + chr(34) + 'code' + chr(34), ''))}",
            f"  let {name} = routed(left, right)",
        ]
    else:
        who = ("T",)
        teachers = [f"  teacher T = external(access = {access})"]
    lines = [
        "opd 1",
        *sorted(set(imports)),
        "",
        *w.defs,
        "",
        f'method generated_{seed} "generated" {{',
        *w.params,
        f"  state {state}",
        *teachers,
        *w.lets,
        *terms,
        f"  aggregate {aggregate}",
        *regularizers,
        "}",
        "",
    ]
    return Text(seed, "\n".join(lines), who, tuple(w.critics), frozenset(w.features))


def compiled(text: str) -> Method:
    """The method of a text; errors that a spec may override are overridden, others raise."""
    allowed: set[str] = set()
    while True:
        try:
            return opdsl.compile(text)
        except CompileError as error:
            names = {d.slug for d in error.diagnostics if d.code[3] == "3"}
            if not names - allowed:
                raise
            allowed |= names
            allows = "".join(f'  allow {n} "generated"\n' for n in sorted(names))
            head, brace, rest = text.partition('"generated" {\n')
            text = head + brace + allows + rest
