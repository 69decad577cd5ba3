"""The loss class of standalone files: the text of this file closes every emitted file.

Legend: B sequences, T positions, N rows (response tokens), V vocabulary. The tables below are
replaced in emitted files by those of the method.
"""

import torch

PASSES = ()  # (rows, kind, function, inputs, imports), in order
FIELDS = {}  # input -> (field of the prompt, text it must equal)
CRITICS = {}  # input -> name of the critic
ROUTED = ()  # (name, teachers, conditions)
DISTS = {}  # rows -> {name in the text: name}


class Known(torch.autograd.Function):
    """A scalar whose gradient with respect to the logits is already known."""

    @staticmethod
    def forward(ctx, logits, total, dz):
        ctx.dz, ctx.dtype = dz, logits.dtype
        return total.clone()

    @staticmethod
    def backward(ctx, grad):
        dz = ctx.dz
        return (None if dz is None else (dz * grad).to(ctx.dtype)), None, None


class Packed:
    """Response tokens of a batch in reading order; empty sequences are left out."""

    def __init__(self, tokens, mask):
        mask = mask.to(torch.bool)
        self.mask, self.shape = mask, tuple(mask.shape)
        self.kept = torch.nonzero(mask.sum(1) > 0).flatten()
        self.length = mask.sum(1)[self.kept]
        self.place = torch.nonzero(mask.reshape(-1)).flatten()
        index = torch.full((self.shape[0],), -1, dtype=torch.int64, device=mask.device)
        index[self.kept] = torch.arange(self.kept.numel(), device=mask.device)
        self.seq = index[self.place // max(self.shape[1], 1)]
        self.pos = (mask.cumsum(1) - 1).reshape(-1)[self.place]
        self.y = self.rows(tokens).to(torch.int64)

    def rows(self, x):
        return x.reshape(-1, *x.shape[2:])[self.place]

    def boot(self, values):
        """Critic values after the last response token of each sequence."""
        t = self.shape[1]
        if values.shape[1] == t:
            return values.new_zeros(self.kept.numel())
        index = torch.arange(t, device=values.device)
        last = torch.where(self.mask, index, -1).amax(1)
        return values.gather(1, (last + 1)[:, None]).squeeze(1)[self.kept]


class Loss(torch.nn.Module):
    """The method's loss; see REQUIRES for the arguments it reads."""

    def forward(
        self, student_logits, teacher_logits=None, tokens=None, mask=None, *, rollout_logprobs=None,
        initial_logits=None, outcome=None, group=None, values=None, special=None, prompt=None,
        golden=None, step=0, total_steps=1,
    ):  # fmt: skip
        """student_logits [B, T, V], index t predicting tokens[:, t]; mask [B, T] marks response
        tokens; teacher_logits a tensor or {name: tensor}; golden (logits, tokens, mask) of given
        text. Returns a scalar, differentiable with respect to the student's logits."""
        given = dict(
            rollout_logp=rollout_logprobs, outcome=outcome, group=group, values=values,
            special=special, prompt=prompt, step=float(step), total_steps=float(total_steps),
        )  # fmt: skip
        teachers = teacher_logits if isinstance(teacher_logits, dict) else {"T": teacher_logits}
        dists = {**{k: v for k, v in teachers.items() if v is not None}, "student": student_logits}
        if initial_logits is not None:
            dists["initial"] = initial_logits
        total = run("main", dists, Packed(tokens, mask), given)
        if golden is not None:
            logits, text, where_ = golden
            total = total + run("golden", {"student": logits}, Packed(text, where_), given)
        return total


def run(part, dists, p, given):
    """All passes of one set of rows."""
    student = p.rows(dists["student"])
    like = torch.float64 if student.dtype == torch.float64 else torch.float32
    passes = [x for x in PASSES if x[0] == part]
    if not passes or p.y.numel() == 0:
        return student.sum() * 0.0
    tables = distributions(part, dists, p, given, like)
    group = given["group"]
    group = torch.arange(p.kept.numel(), device=p.y.device) if group is None else group[p.kept]
    coupling = Coupling(p.seq, p.pos, p.length, group)  # noqa: F821
    store = {}
    for _, kind, function, inputs, imports in passes:
        x = {"step": given["step"], "total_steps": given["total_steps"]}
        for key, per in inputs:
            value = read(key, p, given, tables, like)
            x[key] = value[p.seq] if kind == "rows" and per == "sequence" else value
        x.update({key: store[key] for key in imports})
        call = globals()[function]
        if kind == "batch":
            store.update(call(coupling, x, like))
            continue
        with torch.no_grad():
            out = call(tables, {"y": p.y, **x}, like)
        if isinstance(out, tuple):
            value, dz, _ = out
            value = torch.as_tensor(value, dtype=like).expand(p.y.numel())
            return Known.apply(student, value.sum(), dz)
        size = p.y.numel()
        store.update({k: torch.as_tensor(v).expand(size) for k, v in out.items()})
    raise AssertionError("no closing pass")


def distributions(part, dists, p, given, like):
    """Every distribution the passes read, by its name in the text."""
    found = {k: p.rows(v).detach().to(like) for k, v in dists.items()}
    for name, parts, conditions in ROUTED:
        if name in found or any(q not in found for q in parts):
            continue
        chosen = found[parts[-1]]
        for q, condition in list(zip(parts, conditions))[-2::-1]:
            hit = [condition is None or str(f.get(condition[0])) == condition[1] for f in given["prompt"]]
            hit = torch.tensor(hit, device=p.y.device)[p.kept][p.seq]
            chosen = torch.where(hit[:, None], found[q], chosen)
        found[name] = chosen
    others = [k for k in found if k not in ("student", "initial")]
    out = {}
    for mangled, name in DISTS[part].items():
        if name not in found and name != "initial" and len(others) == 1:
            name = others[0]
        if name not in found:
            raise ValueError(f"this method reads the distribution {name!r}: pass its logits")
        out[mangled] = Dense(found[name], p.y)  # noqa: F821
    return out


def read(key, p, given, tables, like):
    """An input of a pass: [B] for sequence values, [N] for token values."""
    if key == "length":
        return p.length.to(like)
    if key == "position":
        return p.pos.to(like)
    if key in FIELDS:
        field, text = FIELDS[key]
        hits = [str(f.get(field)) == text for f in given["prompt"]]
        return torch.tensor(hits, device=p.y.device)[p.kept]
    if key.removeprefix("boot_") in CRITICS:
        values = given["values"]
        if isinstance(values, dict):
            values = values[CRITICS[key.removeprefix("boot_")]]
        if values is None:
            raise ValueError("this method reads a critic: pass values [B, T + 1]")
        found = p.boot(values) if key.startswith("boot_") else p.rows(values[:, : p.shape[1]])
        return found.detach().to(like)
    value = given[key]
    if key == "special":
        zeros = torch.zeros(p.y.numel(), dtype=torch.bool, device=p.y.device)
        return zeros if value is None else p.rows(value).to(torch.bool)
    if key == "rollout_logp":
        return tables["student"].at_y() if value is None else p.rows(value).detach().to(like)
    if value is None:
        raise ValueError(f"this method reads {key!r}: pass it")
    return value[p.kept].detach().to(like)
