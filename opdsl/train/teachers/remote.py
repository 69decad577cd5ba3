"""A teacher on a server: batches to rows, scores to tensors, and what happens when it fails.

Shapes: B rows, T response tokens, K entries of a list, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from opdsl.train.errors import BatchDropped, TeacherLost, problem
from opdsl.train.teachers import Scores
from opdsl.train.teachers.link import Link, Patience
from opdsl.train.teachers.oracle import Canary, examine
from opdsl.train.teachers.servers import Changed, OpdslServer
from opdsl.train.teachers.transport import Fault
from opdsl.train.teachers.wire import Row, RowScores, Want

CANARY_EVERY = 100  # batches between two looks at a server that does not name its weights


def _never() -> bool:
    return False


def _silent(what: str, n: int = 1) -> None:
    """Where nobody counts or listens."""


class RemoteTeacher:
    """Scores from a server.

    view: prompt -> the tokens this teacher reads. needed: whether a prompt's rows are read of this
    teacher at all (it may be one of several, chosen by a field). ids_from: (distribution, k) lists
    whose tokens must be handed to `score` as ids. stopped: whether somebody asked the run to end.
    count, say: what was lost, and what a user should know now.
    """

    def __init__(
        self,
        name: str,
        link: Link,
        view: Callable[[Any], Sequence[int]],
        device: Any,
        vocabulary: int,
        *,
        fused: bool = False,
        patience: Patience | None = None,
        needed: Callable[[Any], bool] = lambda prompt: True,
        say: Callable[[str], None] = _silent,
    ):
        self.name, self.link, self.view, self.device = name, link, view, device
        self.vocabulary, self.patience, self.needed = vocabulary, patience or Patience(), needed
        self.say: Callable[[str], None] = say
        self.count: Callable[[str, int], None] = _silent
        self.stopped: Callable[[], bool] = _never
        self.head: Any = None
        wants, whole = link.wants, ""
        if wants.whole:
            hidden = fused and isinstance(link.server, OpdslServer) and link.server.hidden
            whole = "hidden" if hidden else "logits"
        self.ids_from = () if wants.whole else wants.ids_from
        top = 0 if wants.whole else min(wants.top, vocabulary)
        self.want = Want(top=top, whole=whole, vocabulary=vocabulary)
        link.vocabulary = vocabulary
        link.client.stopped = lambda: self.stopped()
        self.canary: Canary | None = None
        self.dropped = self.batches = 0
        self._counted: dict[str, int] = {}

    # ---- the start of a run ------------------------------------------------------------------

    def begin(self, prompts: Sequence[Any]) -> list[str]:
        """Examine the server on a few prompts; notes for the user.

        Raises RunProblem OPD732 for a teacher whose scores cannot be right, OPD730 for one that
        does not answer.
        """
        try:
            if self.want.whole == "hidden":
                head = self.link.server.head()
                weight = head.weight.to(self.device)
                bias = None if head.bias is None else head.bias.to(self.device)
                self.head = replace(head, weight=weight, bias=bias, vocab=self.vocabulary)
            room = self.link.server.context or 1 << 30
            views = [tuple(self.view(p)) for p in prompts]
            rows = [Row(v + v[: max(1, min(6, room - len(v)))], len(v)) for v in views]
            self.canary, notes = examine(self.link, rows, self.want)
        except Fault as fault:
            code = "OPD732" if fault.tries else "OPD730"
            raise problem(
                code,
                f"teacher {self.name}: {self.link.server.url}: {fault.text}",
                notes=["found before the first step, on the run's own prompts"],
                exit_code=3,
            ) from None
        except Changed as change:
            raise problem(
                "OPD732",
                f"teacher {self.name}: {self.link.server.url} changes while it is asked: {change}",
                exit_code=3,
            ) from None
        return [f"teacher {self.name}: {note}" for note in (*self.link.server.notes, *notes)]

    # ---- scores ------------------------------------------------------------------------------

    def score(self, prompts: Sequence[Any], tokens_BT, lengths_B, ids_BTK=None) -> Scores:
        """Scores of a batch. Raises TeacherLost, BatchDropped, or RunProblem OPD732."""
        lengths = lengths_B.tolist()
        tokens, ids = tokens_BT.tolist(), None if ids_BTK is None else ids_BTK.cpu()
        asked = [i for i, p in enumerate(prompts) if self.needed(p)]
        rows = []
        for i in asked:
            view, n = tuple(self.view(prompts[i])), lengths[i]
            more = None if ids is None else ids[i, :n]
            rows.append(Row(view + tuple(tokens[i][:n]), len(view), more))
        self._fits(rows)
        found = self._ask(rows) if rows else []
        B, T = tokens_BT.shape
        K = 0 if ids is None else ids.shape[-1]
        return self._tensors(dict(zip(asked, zip(rows, found))), B, T, K)

    def _fits(self, rows: Sequence[Row]) -> None:
        context = self.link.server.context
        longest = max((len(r.tokens) for r in rows), default=0)
        if context and longest > context:
            raise problem(
                "OPD709",
                f"teacher {self.name} reads at most {context} tokens, a row has {longest}",
                helps=["a smaller --max-tokens, or a server with a longer context"],
            )

    def _ask(self, rows: Sequence[Row]) -> list[RowScores]:
        waiting = False
        while True:
            try:
                if self.canary is not None and self._due():
                    self.canary.check(self.link)
                found = self.link.ask(rows, self.want)
                break
            except Changed as change:
                raise problem(
                    "OPD732",
                    f"teacher {self.name}: {self.link.server.url} has changed: {change}",
                    notes=["nothing was learned from the new one"],
                    helps=["serve the model the run began with and continue with --resume"],
                    exit_code=4,
                ) from None
            except Fault as fault:
                self._failed(fault)
                if not waiting:
                    self.say(f"teacher {self.name} gives no scores ({fault.text}); waiting for it")
                    self.count(f"times the run waited for teacher {self.name}", 1)
                waiting = True
            finally:
                self._pass_on()
        if waiting:
            self.say(f"teacher {self.name} is back")
        self.batches += 1
        return found

    def _due(self) -> bool:
        """Whether to look at the canary: now and then, and after any trouble on the line."""
        if self.link.server.weights is not None:
            return False  # every answer names the weights it came from
        return self.batches % CANARY_EVERY == CANARY_EVERY - 1 or self.link.client.troubled

    def _failed(self, fault: Fault) -> None:
        """Raise what the user's choice makes of a failed batch; return to wait and ask again."""
        where = f"teacher {self.name}: no scores from {self.link.server.url}: {fault.text}"
        if self.stopped() or not fault.passing or self.patience.kind == "halt":
            raise TeacherLost(where)
        if self.patience.kind == "drop_batch":
            if self.dropped >= self.patience.most:
                raise TeacherLost(f"{where}; {self.dropped} batches were dropped before")
            self.dropped += 1
            raise BatchDropped(f"dropped: teacher {self.name}", where)

    def _pass_on(self) -> None:
        """Hand what happened on the wire to whoever counts it."""
        counts = self.link.client.counts
        with counts.lock:
            now = {f"teacher {self.name}: {k}": n for k, n in counts.faults.items()}
            now[f"teacher {self.name}: requests tried again"] = counts.retries
        for what, n in now.items():
            if n > self._counted.get(what, 0):
                self.count(what, n - self._counted.get(what, 0))
        self._counted = now

    def _tensors(self, found: dict[int, tuple[Row, RowScores]], B: int, T: int, K: int) -> Scores:
        """[B, T, …] tensors; zeros in rows that were not asked and behind a row's end."""
        want = self.want
        if want.whole:
            width = self.vocabulary if self.head is None else self.head.weight.shape[1]
            dtype = torch.float32 if self.head is None else self.head.weight.dtype
            whole_BTx = torch.zeros(B, T, width, dtype=dtype)
            for i, (row, one) in found.items():
                whole_BTx[i, : row.response] = one.whole
            whole_BTx = whole_BTx.to(self.device)
            if want.whole == "hidden":
                return Scores(hidden=whole_BTx, head=self.head)
            return Scores(logits=whole_BTx)
        logprobs_BT = torch.zeros(B, T)
        ids_BTK = torch.zeros(B, T, want.top + K, dtype=torch.int64)
        logp_BTK = torch.full((B, T, want.top + K), -torch.inf)
        for i, (row, one) in found.items():
            logprobs_BT[i, : row.response] = one.sampled
            if one.top_ids is not None:
                ids_BTK[i, : row.response, : want.top] = one.top_ids
                logp_BTK[i, : row.response, : want.top] = one.top_logprobs
            if row.ids is not None:
                ids_BTK[i, : row.response, want.top :] = row.ids
                logp_BTK[i, : row.response, want.top :] = one.ids_logprobs
        lists = (ids_BTK.to(self.device), logp_BTK.to(self.device)) if want.top + K else (None,) * 2
        return Scores(logprobs=logprobs_BT.to(self.device), top_ids=lists[0], top_logprobs=lists[1])

    # ---- what the trainer asks of every teacher ------------------------------------------------

    def memory(self) -> dict[str, int]:
        """What a resumed run must remember: batches dropped count against the limit."""
        return {"dropped": self.dropped}

    def remember(self, kept: dict[str, int]) -> None:
        self.dropped = int(kept.get("dropped", 0))

    def after_update(self) -> None:
        """A served teacher does not change."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, tensors: dict[str, Any]) -> None:
        """A served teacher has nothing to load."""
