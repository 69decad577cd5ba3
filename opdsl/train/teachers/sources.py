"""The words after `--teacher NAME=`: a model, the address of a server, or a folder of scores.

    FOLDER or hub name         a model loaded into this process
    http://HOST:PORT           a server of `opdsl serve`
    vllm+http://HOST:PORT      a vLLM server; `#NAME` behind it chooses among several models
    sglang+http://HOST:PORT    an SGLang server
    DIR                        scores written by `opdsl score`

`https` works wherever `http` does. An address never holds a key: it would end up in every
artefact of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from opdsl.meaning.spec import Spec
from opdsl.train.errors import problem
from opdsl.train.teachers.capabilities import (
    NO_LIMIT,
    PER_POSITION,
    PER_REQUEST,
    Capabilities,
    refuse_unable,
)

MANIFEST = "scores.json"  # what makes a folder one of stored scores

# What a kind can give at best; a server that is asked may turn out to give less.
AT_BEST = {
    "opdsl": Capabilities("opdsl serve", True, NO_LIMIT, PER_POSITION, whole=True),
    "vllm": Capabilities("a vLLM server", True, NO_LIMIT, PER_POSITION),
    "sglang": Capabilities("an SGLang server", True, NO_LIMIT, PER_REQUEST),
    "stored": Capabilities("stored scores", True, NO_LIMIT),
}


@dataclass(frozen=True)
class Source:
    """A teacher that is no model of this process.

    kind: "opdsl", "vllm", "sglang" or "stored". text: as the user wrote it. For a server host,
    port, whether it speaks TLS, the path before its own paths, and the model's name asked for.
    """

    kind: str
    text: str
    host: str = ""
    port: int = 0
    tls: bool = False
    prefix: str = ""
    model: str | None = None


def is_distant(text: str) -> bool:
    """Whether this teacher's scores come from outside this process."""
    return "://" in text or is_stored(text)


def is_stored(text: str) -> bool:
    return (Path(text).expanduser() / MANIFEST).is_file()


def parse(text: str, role: str) -> Source:
    """The source behind a word `is_distant` knows. Raises RunProblem OPD402 for a bad address."""
    if "://" not in text:
        return Source("stored", text)
    kind, _, plain = text.rpartition("+") if "+" in text.split("://")[0] else ("opdsl", "", text)
    try:
        parts = urlsplit(plain)
        port = parts.port
    except ValueError:
        raise _bad(role, text, "this address cannot be read") from None
    if kind not in ("opdsl", "vllm", "sglang") or parts.scheme not in ("http", "https"):
        raise _bad(role, text, f"`{text.split('://')[0]}` is no kind of server")
    if parts.username is not None or parts.password is not None or parts.query:
        hidden = text.replace(parts.netloc.rpartition("@")[0], "…") if "@" in parts.netloc else text
        raise _bad(role, hidden.split("?")[0], "an address holds no key and no question mark")
    if not parts.hostname:
        raise _bad(role, text, "this address names no host")
    tls = parts.scheme == "https"
    return Source(
        kind,
        text,
        parts.hostname,
        port or (443 if tls else 80),
        tls,
        parts.path.rstrip("/"),
        parts.fragment or None,
    )


def _bad(role: str, text: str, why: str):
    return problem(
        "OPD402",
        f"teacher {role}: {text}: {why}",
        helps=[
            f"--teacher {role}=http://HOST:PORT (opdsl serve), vllm+http://… or sglang+http://…",
            "a key goes into an environment variable: see --teacher-key-env",
        ],
    )


def refuse_by_kind(spec: Spec, teachers: Mapping[str, str | None]) -> None:
    """Refuse what no server of a kind can give, from words alone. Raises RunProblem OPD402, 407."""
    found = distant(teachers)
    refuse_unable(spec, {name: (s.text, AT_BEST[s.kind]) for name, s in found.items()})


def distant(teachers: Mapping[str, str | None]) -> dict[str, Source]:
    """Teacher role -> source, for those whose scores come from outside this process."""
    return {name: parse(text, name) for name, text in teachers.items() if text and is_distant(text)}
