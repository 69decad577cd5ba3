"""Servers that score: what is asked of each kind, and what its answers mean.

A server says what it can give when it is first asked (`connect`), and scores rows after that. The
paths and fields of vLLM and SGLang are in `vllm` and `sglang`; here are the parts they share and
the server of `opdsl serve`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opdsl.emit.kernels.head import Head
from opdsl.train.teachers.capabilities import NO_LIMIT, PER_POSITION, Capabilities, Wants
from opdsl.train.teachers.sources import Source
from opdsl.train.teachers.transport import Client, Fault
from opdsl.train.teachers.wire import (
    BINARY,
    BadMessage,
    Row,
    RowScores,
    Want,
    decode_answer,
    encode_request,
    unpack,
)


class Changed(Exception):
    """The server is no longer the one that was asked first. One clause."""


@dataclass
class Server:
    """One scoring server, as it described itself when it was first asked.

    model: its name there. vocabulary: words its distributions are over, None if it does not say.
    tokenizer, weights: hashes, None if it does not say. context: longest row (tokens). per_request:
    tokens sent in one request; at_once: requests under way at the same time. notes: what a user
    should know.
    """

    client: Client
    model: str
    capabilities: Capabilities
    vocabulary: int | None = None
    tokenizer: str | None = None
    weights: str | None = None
    context: int | None = None
    per_request: int = 16_384
    at_once: int = 1
    notes: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return self.client.source.text

    def score(self, rows: Sequence[Row], want: Want, limit: float) -> list[RowScores]:
        """One request. Raises Fault, or Changed for another model than before."""
        raise NotImplementedError

    def head(self) -> Head:
        """The head for hidden states. Raises Fault."""
        raise Fault("it gives no hidden states", passing=False)

    def tokens_of(self, text: str) -> list[int] | None:
        """The text as its tokenizer splits it, or None if it does not say."""
        return None

    def identity(self) -> dict[str, str]:
        """What a resumed run must find again."""
        return {"weights": self.weights} if self.weights else {"model": self.model}


def model_named(data: Any, wanted: str | None) -> dict[str, Any]:
    """The entry of `/v1/models` that is meant. Raises Fault."""
    found = data.get("data") if isinstance(data, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(m, dict) for m in found):
        raise Fault("what answers lists no models", passing=False)
    names = [str(m.get("id")) for m in found]
    if wanted is None and len(found) > 1:
        shown = ", ".join(names[:5])
        raise Fault(f"it serves {len(found)} models ({shown}); say which with #NAME", passing=False)
    if wanted is not None and wanted not in names:
        raise Fault(f"it serves {', '.join(names[:5])}, not {wanted}", passing=False)
    return found[0 if wanted is None else names.index(wanted)]


class OpdslServer(Server):
    """`opdsl serve`: everything, exactly."""

    @classmethod
    def connect(cls, client: Client, source: Source, wants: Wants) -> OpdslServer:
        """Raises Fault if nothing answers, or something else does."""
        info = model_named(client.json("GET", "/v1/models", limit=client.first), source.model)
        can = info.get("capabilities")
        if not isinstance(can, dict) or not isinstance(info.get("weights"), str):
            raise Fault("what answers is not `opdsl serve`; for other servers write"
                        " vllm+http://… or sglang+http://…", passing=False)  # fmt: skip
        capabilities = Capabilities(
            "opdsl serve",
            bool(can.get("sampled")),
            # A list as long as the vocabulary is all there is to give.
            NO_LIMIT if int(can.get("top", 0)) >= int(info["vocabulary"]) else int(can["top"]),
            PER_POSITION if can.get("ids") == PER_POSITION else "none",
            whole=bool(can.get("whole")),
        )
        server = cls(
            client,
            str(info["id"]),
            capabilities,
            int(info["vocabulary"]),
            info.get("tokenizer"),
            info["weights"],
            info.get("context"),
            int(info.get("max_batch_tokens", 16_384)),
        )
        server.rows_of_head = int(info.get("vocabulary_rows", info["vocabulary"]))
        server.hidden = "hidden" in can.get("whole", ())
        return server

    rows_of_head: int = 0
    hidden: bool = False

    def score(self, rows: Sequence[Row], want: Want, limit: float) -> list[RowScores]:
        body = encode_request(rows, want, {"model": self.model, "within": limit})
        answer = self.client.call(
            "POST", "/score", body, content_type=BINARY, accept=BINARY, limit=limit
        )
        try:
            found, said = decode_answer(answer)
        except BadMessage as error:
            raise Fault(str(error), tries=3) from None
        if said.get("model") != self.model:
            raise Changed(f"it serves the model {said.get('model')!r}, before {self.model!r}")
        if said.get("weights") != self.weights:
            raise Changed("its weights are not those it had before")
        return found

    def head(self) -> Head:
        answer = self.client.call("GET", "/head", accept=BINARY, limit=self.client.deadline)
        try:
            said, tensors = unpack(answer)
            scale, cap = float(said["scale"]), said["soft_cap"]
            return Head(tensors["weight"], tensors.get("bias"), scale, cap)
        except (BadMessage, KeyError, TypeError, ValueError) as error:
            raise Fault(f"its head cannot be read: {error}", tries=3) from None


def connect(client: Client, source: Source, wants: Wants) -> Server:
    """The server behind an address. Raises Fault."""
    from opdsl.train.teachers.sglang import SglangServer
    from opdsl.train.teachers.vllm import VllmServer

    kinds = {"opdsl": OpdslServer, "vllm": VllmServer, "sglang": SglangServer}
    try:
        return kinds[source.kind].connect(client, source, wants)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Fault(
            f"what answers does not describe itself ({type(error).__name__})", passing=False
        ) from None


def column(values: list[Any], what: str) -> torch.Tensor:
    """float32 numbers out of JSON; Raises Fault."""
    try:
        return torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        shown = json.dumps(values, default=str)[:60]
        raise Fault(f"{what} are not numbers: {shown}", tries=3) from None


def entries(
    lists: Sequence[Sequence[tuple[float, int]]], k: int, tokens: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [T, k], log-probabilities [T, k]) of T lists of (log-probability, id), possibly short.

    What is missing has log-probability −inf and an id that is neither in the list nor the response
    token (tokens [T]): nothing is invented, and no score that is known is hidden. Raises Fault for
    an empty list.
    """
    ids_Tk = torch.zeros(len(lists), k, dtype=torch.int64)
    logp_Tk = torch.full((len(lists), k), -torch.inf)
    for t, (found, token) in enumerate(zip(lists, tokens)):
        best = sorted(found, key=lambda x: -x[0])[:k]
        if not best:
            raise Fault("a list of top tokens is empty", tries=3)
        if len(best) < k:
            known = {int(i) for _, i in best} | {token}
            free = next(i for i in range(len(known) + 1) if i not in known)
            ids_Tk[t] = free
        for j, (logp, i) in enumerate(best):
            ids_Tk[t, j], logp_Tk[t, j] = int(i), float(logp)
    return ids_Tk, logp_Tk
