"""Run-time functions of emitted modules: the text of this file is part of every emitted file.

Legend: B sequences, N rows (response tokens of the batch), n rows of one block, K entries of an
index set, V vocabulary. An index set is (ids [n, K], valid [n, K]); None is the whole vocabulary.
"""

import math

import torch

FLOOR = -1e30  # log-probability of an impossible entry: finite, so that 0 * log 0 = 0
TAIL_FLOOR = -13.815510557964274  # log 1e-6, the least mass of a tail bin


class Dense:
    """A distribution given by logits [n, V] (float32 or float64) at sampled tokens [n]."""

    def __init__(self, logits, y):
        self.z, self.y = logits, y
        self._lse, self._at = None, {}

    @property
    def lse(self):
        if self._lse is None:
            self._lse = torch.logsumexp(self.z, -1, keepdim=True)
        return self._lse

    def tempered(self, temperature):
        if temperature == 1.0:
            return self
        if temperature not in self._at:
            self._at[temperature] = Dense(self.z / temperature, self.y)
        return self._at[temperature]

    def rescaled(self, temperature, out):
        """Logits over the temperature, in a buffer; `tempered` gives this distribution from now."""
        self._at[temperature] = Dense(torch.div(self.z, temperature, out=out), self.y)
        return out

    def measure(self, out):
        """exp(z - max z) into a buffer; its sum [n]. Keeps the log-sum-exp."""
        top = self.z.amax(1, keepdim=True)
        total = torch.sub(self.z, top, out=out).exp_().sum(1, keepdim=True)
        self._lse = top + total.log()
        return total[:, 0]

    def full(self):
        return (self.z - self.lse).clamp_min_(FLOOR)

    def at(self, ids):
        return (self.z.gather(1, ids) - self.lse).clamp_min_(FLOOR)

    def at_y(self):
        return self.at(self.y[:, None]).squeeze(1)

    def top(self, k):
        return top(self.z, k, self.lse)

    def top_p(self, p, k):
        return top_p(self.z, p, k, self.lse)


class Sparse:
    """What a served teacher gives: its top K (ids, log-probabilities) and the sampled token's."""

    def __init__(self, ids, logp, logp_y, y):
        self.ids, self.y = ids, y
        self.logp = None if logp is None else logp.clamp_min(FLOOR)
        self.logp_y = None if logp_y is None else logp_y.clamp_min(FLOOR)

    def tempered(self, temperature):
        if temperature != 1.0:
            raise ValueError("a tempered teacher needs full logits")
        return self

    def rescaled(self, temperature, out):
        """Refused, like `tempered`."""
        return self.tempered(temperature)

    def measure(self, out):
        """A list of log-probabilities is normalised already."""
        return None

    def full(self):
        raise ValueError("this method reads the teacher's full distribution; only its top is given")

    def at(self, ids):
        out = torch.full_like(
            ids, FLOOR, dtype=(self.logp if self.logp is not None else self.logp_y).dtype
        )
        if self.logp_y is not None:
            out = torch.where(ids == self.y[:, None], self.logp_y[:, None], out)
        if self.ids is not None:
            for k in range(self.ids.shape[1]):
                out = torch.where(ids == self.ids[:, k : k + 1], self.logp[:, k : k + 1], out)
        return out

    def at_y(self):
        if self.logp_y is None:
            raise ValueError(
                "this method reads the teacher at the sampled token: pass teacher_logprobs"
            )
        return self.logp_y

    def top(self, k):
        if self.ids is None:
            raise ValueError("this method reads the teacher's top tokens: pass teacher_topk_ids")
        ids = self.ids[:, :k]
        return ids, (self.logp[:, :k] > FLOOR / 2) & first(ids)


class Asked:
    """A distribution known up to one factor per row, where it is asked: at(ids) gives logits."""

    def __init__(self, at, y, temperature=1.0):
        self._logits, self.y, self._temperature = at, y, temperature

    def tempered(self, temperature):
        return Asked(self._logits, self.y, temperature)

    def at(self, ids):
        z = self._logits(ids).clamp_min(FLOOR)
        return z if self._temperature == 1.0 else z / self._temperature

    def asked(self, ids):
        """The ids as they were asked for."""
        return ids


# ---- index sets --------------------------------------------------------------------------------


def top(x, k, lse=0.0):
    """The k most probable entries of logits (or log-probabilities) [n, V]."""
    best, ids = x.topk(min(k, x.shape[1]), -1)
    return ids, (best - lse) > FLOOR / 2


def top_p(x, p, k, lse=0.0):
    """The most probable entries until their mass reaches p, at most k."""
    best, ids = x.topk(min(k, x.shape[1]), -1)
    prob = (best - lse).exp()
    return ids, (prob.cumsum(-1) - prob < p) & (best - lse > FLOOR / 2)


def first(ids):
    """Whether an entry is the first of its row with this id (lists joined by hand may repeat)."""
    order = ids.sort(dim=1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = order.values[:, 1:] == order.values[:, :-1]
    return ~torch.zeros_like(again).scatter_(1, order.indices, again)


def member(ids, s):
    """Whether ids [n, K] lie in a set."""
    if s is None:
        return torch.ones_like(ids, dtype=torch.bool)
    hit = torch.zeros_like(ids, dtype=torch.bool)
    for k in range(s[0].shape[1]):
        hit |= (ids == s[0][:, k : k + 1]) & s[1][:, k : k + 1]
    return hit


def union(*sets):
    """Entries of any set, each once."""
    ids, valid = sets[0]
    for other, ok in sets[1:]:
        fresh = ok & ~member(other, (ids, valid))
        ids, valid = torch.cat([ids, other], 1), torch.cat([valid, fresh], 1)
    return ids, valid


def intersection(first, *others):
    ids, valid = first
    for s in others:
        valid = valid & member(ids, s)
    return ids, valid


def with_bin(s):
    """A set with one more entry for everything else."""
    ids, valid = s
    return torch.cat([ids, torch.full_like(ids[:, :1], -1)], 1), torch.cat(
        [valid, torch.ones_like(valid[:, :1])], 1
    )


def add_bin(x, s):
    """Log-probabilities [n, K] and the log of the remaining mass, floored."""
    lse = torch.logsumexp(x.masked_fill(~s[1], FLOOR), 1)
    rest = -torch.expm1(lse)
    tail = torch.where(
        rest > math.exp(TAIL_FLOOR), rest.clamp_min(math.exp(TAIL_FLOOR)).log(), TAIL_FLOOR
    )
    return torch.cat([x, tail.to(x.dtype)[:, None]], 1)


def entries(x, s, fill, n, v):
    """A value on the entries of a set: [n, K] (or [n, V]), `fill` at entries not valid."""
    x = x[:, None] if x.dim() == 1 else x
    return x.expand(n, v) if s is None else torch.where(s[1], x, fill)


def largest(x):
    """Maximum over the entries [n, K]; 0 of no entries, as a sum of none."""
    best = x.amax(1)
    return torch.where(best > FLOOR / 2, best, 0.0)


def put(x, s, n, v):
    """Adjoint of a gather: [n, K] -> [n, V]."""
    x = entries(x, s, 0.0, n, v)
    return torch.zeros(n, v, dtype=x.dtype, device=x.device).scatter_add_(1, s[0], x)


def softmax_adjoint(dist, temperature, at_y, at_sets, dense):
    """dL/dz [n, V] from dL/dlog p: g - (sum g) p, over the temperature (theory 3.3)."""
    scaled = dist.tempered(temperature)
    z, lse = scaled.z, scaled.lse
    n, v = z.shape
    p = (z - lse).exp_()
    total = torch.zeros(n, 1, dtype=z.dtype, device=z.device)
    pieces = []
    if at_y is not None:
        x = torch.as_tensor(at_y, dtype=z.dtype, device=z.device).expand(n)[:, None]
        pieces.append((dist.y[:, None], x))
    for s, x in at_sets:
        pieces.append((s[0], entries(x, s, 0.0, n, v).to(z.dtype)))
    for _, x in pieces:
        total = total + x.sum(1, keepdim=True)
    if dense is not None:
        dense = entries(dense, None, 0.0, n, v).to(z.dtype)
        total = total + dense.sum(1, keepdim=True)
    out = p.mul_(-total)
    if dense is not None:
        out += dense
    for ids, x in pieces:
        out.scatter_add_(1, ids, x.expand(ids.shape))
    return out if temperature == 1.0 else out.div_(temperature)


def scatter(into, ids, x):
    """Adds x [n, K] to the entries [n, V] at ids, in place."""
    return into.scatter_add_(1, ids, x.expand(ids.shape))


def adjoint_into(e, total, y, temperature, at_y, at_sets, rest, scatter=scatter):
    """`softmax_adjoint` in the buffer of e = exp(z - max z) with e.sum(1) = total [n].

    `rest` [n] is the sum of the dense part, which is added afterwards.
    """
    n, v = e.shape
    mass = torch.as_tensor(rest, dtype=e.dtype, device=e.device).expand(n)[:, None]
    pieces = []
    if at_y is not None:
        x = torch.as_tensor(at_y, dtype=e.dtype, device=e.device).expand(n)[:, None]
        pieces.append((y[:, None], x))
    for s, x in at_sets:
        pieces.append((s[0], entries(x, s, 0.0, n, v).to(e.dtype)))
    for _, x in pieces:
        mass = mass + x.sum(1, keepdim=True)
    e.mul_(mass / (-temperature * total[:, None]))
    for ids, x in pieces:
        scatter(e, ids, x if temperature == 1.0 else x / temperature)


def lse_into(x, out):
    """Log-sum-exp over the entries [n, V] with a buffer to work in."""
    top = x.amax(1, keepdim=True)
    return (top + torch.sub(x, top, out=out).exp_().sum(1, keepdim=True).log())[:, 0]


def multiple_into(x, y, scale, out):
    """x + scale y, the scale a column or a plain number."""
    if torch.is_tensor(scale) and scale.dim():
        return torch.addcmul(x, y, scale, out=out)
    return torch.add(x, y, alpha=float(scale), out=out)


def masked_into(x, kept, out):
    """x where kept, else 0."""
    if out is not x:
        out.copy_(x)
    return out.masked_fill_(~kept, 0.0)


def column(x):
    """A number per row lined up with the entries of a row; other numbers as they are."""
    return x[:, None] if torch.is_tensor(x) and x.dim() == 1 else x


# ---- arithmetic --------------------------------------------------------------------------------


def log(x):
    if not torch.is_tensor(x):
        return math.log(x) if x > 0 else FLOOR
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), FLOOR)


def ratio(a, b):
    """a / b with 0 / 0 = 0: an entry that neither side has (padding) weighs nothing."""
    if not torch.is_tensor(a) and not torch.is_tensor(b):
        return a / b if b else math.copysign(math.inf, a) if a else 0.0
    if not torch.is_tensor(b):
        b = torch.as_tensor(b, dtype=a.dtype, device=a.device)
    return torch.where((a == 0) & (b == 0), 0.0, a / b)


def schedule(kind, start, stop, over, step, total):
    """A number that moves with the step."""
    span = total if over is None else over
    x = min(max(step / span, 0.0), 1.0)
    if kind == "cosine":
        x = 0.5 * (1.0 - math.cos(math.pi * x))
    return start + (stop - start) * x


def uniform(place, step, k):
    """One draw in [0, 1) per place, step and call site: a 31-bit mix, the same everywhere."""
    x = (place * 747796405 + (step * 891213001 + k * 277803737 + 12345)) & 0x7FFFFFFF
    x = ((x ^ (x >> 15)) * 1103515245) & 0x7FFFFFFF
    x = ((x ^ (x >> 15)) * 1566083941) & 0x7FFFFFFF
    return ((x ^ (x >> 13)) & 0x7FFFFFFF).double() / 2147483648.0


def where(test, yes, no, like):
    """torch.where for any mix of numbers and tensors; the result varies over what either does."""
    if not torch.is_tensor(test) or test.dim() == 0:
        chosen, other = (yes, no) if test else (no, yes)
        if not torch.is_tensor(other) or other.dim() == 0:
            return chosen
        chosen = torch.as_tensor(chosen, dtype=like, device=other.device)
        return chosen.expand(torch.broadcast_tensors(chosen, other)[0].shape)
    yes = torch.as_tensor(yes, dtype=like, device=test.device)
    no = torch.as_tensor(no, dtype=like, device=test.device)
    return torch.where(test, yes, no)


# ---- coupling along and across sequences (batch passes) ------------------------------------------


class Coupling:
    """Where rows sit: seq [N], pos [N], length [B], group [B]."""

    def __init__(self, seq, pos, length, group):
        self.seq, self.pos, self.length = seq, pos, length
        self.group = torch.unique(group, return_inverse=True)[1] if group.numel() else group
        self.n, self.b = seq.numel(), length.numel()
        self.t = int(length.max()) if self.b else 0

    def pad(self, x):
        """[N] -> [B, T], zero beyond the end."""
        out = torch.zeros(self.b, self.t, dtype=x.dtype, device=x.device)
        out[self.seq, self.pos] = x
        return out

    def unpad(self, x):
        return x[self.seq, self.pos]

    def rows(self, x, like):
        """A number or [N] as [N]."""
        return torch.as_tensor(x, dtype=like, device=self.seq.device).expand(self.n)

    def seqs(self, x, like):
        return torch.as_tensor(x, dtype=like, device=self.seq.device).expand(self.b)

    def per_seq(self, x):
        """[N] that is constant along each sequence -> [B]."""
        if x.dim() == 0:
            return x
        return torch.zeros(self.b, dtype=x.dtype, device=x.device).index_put_((self.seq,), x)

    def sum_t(self, x):
        return torch.zeros(self.b, dtype=x.dtype, device=x.device).index_add_(0, self.seq, x)

    def scan(self, a, c):
        """G[t] = a[t] + c[t] G[t+1]."""
        a, c = self.pad(a), self.pad(c)
        out = torch.empty_like(a)
        after = torch.zeros(self.b, dtype=a.dtype, device=a.device)
        for t in range(self.t - 1, -1, -1):
            after = a[:, t] + c[:, t] * after
            out[:, t] = after
        return self.unpad(out)

    def scan_fwd(self, a, c):
        """G[t] = a[t] + c[t-1] G[t-1]."""
        a, c = self.pad(a), self.pad(c)
        out = torch.empty_like(a)
        before = torch.zeros(self.b, dtype=a.dtype, device=a.device)
        for t in range(self.t):
            out[:, t] = a[:, t] + before
            before = c[:, t] * out[:, t]
        return self.unpad(out)

    def max_t(self, x):
        out = torch.full((self.b,), FLOOR, dtype=x.dtype, device=x.device)
        return out.scatter_reduce_(0, self.seq, x, "amax")

    def rank_t(self, x):
        """Share of the sequence's tokens with a smaller value."""
        padded, row = self.pad(x), torch.arange(self.t, device=x.device)
        real = row < self.length[:, None]
        less = (padded[:, None, :] < padded[:, :, None]) & real[:, None, :]
        return self.unpad(less.sum(-1).to(x.dtype) / self.length.clamp_min(1)[:, None].to(x.dtype))

    def shift(self, x, k, boot=None):
        """Value k tokens later; 0 (or the bootstrap, at the first step past the end) beyond."""
        where_to = self.pos + k
        inside = (where_to >= 0) & (where_to < self.length[self.seq])
        padded = self.pad(x)
        out = padded[self.seq, where_to.clamp(0, max(self.t - 1, 0))]
        out = torch.where(inside, out, torch.zeros_like(out))
        if boot is not None:
            out = torch.where(where_to == self.length[self.seq], boot[self.seq], out)
        return out

    def _key(self, by_group):
        key = self.pos
        return self.group[self.seq] * max(self.t, 1) + key if by_group else key

    def _sum_by(self, x, key):
        size = int(key.max()) + 1 if key.numel() else 0
        return torch.zeros(size, dtype=x.dtype, device=x.device).index_add_(0, key, x)[key]

    def _max_by(self, x, key):
        size = int(key.max()) + 1 if key.numel() else 0
        out = torch.full((size,), FLOOR, dtype=x.dtype, device=x.device)
        return out.scatter_reduce_(0, key, x, "amax")[key]

    def group_sum(self, x):
        return self._sum_by(x, self.group)

    def group_max(self, x):
        return self._max_by(x, self.group)

    def others_sum(self, x):
        return self.group_sum(x) - x

    def group_sum_rows(self, x):
        return self._sum_by(x, self._key(True))

    def group_max_rows(self, x):
        return self._max_by(x, self._key(True))

    def others_sum_rows(self, x):
        return self.group_sum_rows(x) - x

    def position_sum(self, x):
        return self._sum_by(x, self._key(False))

    def quantile(self, x, share):
        x = x.sort().values
        at = share * (x.numel() - 1)
        low, high = math.floor(at), math.ceil(at)
        return torch.lerp(x[low], x[high], at - low)
