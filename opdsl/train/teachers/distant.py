"""The teachers of a run that are not in this process: opened before anything is loaded.

`open_all` connects to every server, reads every folder of scores, and refuses what cannot be
given. Once the student and the data are there, tokenizers, vocabularies and data are compared and
the teachers are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opdsl.codes import make
from opdsl.train import models
from opdsl.train.errors import WRONG_USAGE, RunProblem, problem
from opdsl.train.teachers.capabilities import Capabilities, refuse_unable, wants
from opdsl.train.teachers.link import Link, Patience, open_link
from opdsl.train.teachers.remote import RemoteTeacher
from opdsl.train.teachers.sources import distant
from opdsl.train.teachers.stored import StoredTeacher, capabilities_of, read_manifest

PROBES = 4  # prompts on which a server is examined at the start
PROBE_TEXT = "The 3 quick brown foxes jump over 17 lazy dogs, naïvely: 2 + 2 = 4.\n"


@dataclass
class Distant:
    """Opened teachers by role. folders: role -> (folder, manifest)."""

    spec: Any
    settings: Any
    links: dict[str, Link] = field(default_factory=dict)
    folders: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.links or name in self.folders

    # ---- does it fit -------------------------------------------------------------------------

    def rows(self, student: Any, tokenizer: Any) -> list[int]:
        """How many vocabulary rows each teacher shares with the student.

        Tokenizers are compared by hash where a server names its own, else by how they split a
        text. Raises RunProblem OPD403 or OPD733.
        """
        mine = models.head_of(student).weight.shape[0]
        hashed = models.tokenizer_hash(tokenizer) if tokenizer is not None else None
        shared = []
        for name, link in self.links.items():
            server = link.server
            rows = getattr(server, "rows_of_head", None) or server.vocabulary
            _same_words(name, server.url, hashed, server.tokenizer, mine, rows)
            if server.tokenizer is None and tokenizer is not None:
                _same_pieces(name, server.url, tokenizer, server.tokens_of(PROBE_TEXT))
            shared.append(min(mine, rows or mine))
        for name, (folder, manifest) in self.folders.items():
            rows = int(manifest["vocabulary"])
            _same_words(name, folder, hashed, manifest.get("tokenizer"), mine, rows, "OPD733")
            shared.append(min(mine, rows))
        return shared

    def contexts(self) -> list[int | None]:
        """The longest row (tokens) each server takes, None where it does not say."""
        return [link.server.context for link in self.links.values()]

    def lines(self) -> list[str]:
        """What each teacher outside this process gives, in words."""
        found = [
            f"teacher {name}: {link.server.url} serves {link.server.model} and gives"
            f" {link.server.capabilities.text()}"
            for name, link in self.links.items()
        ]
        return found + [
            f"teacher {name}: {folder} holds scores of {manifest['rows']} texts by"
            f" {manifest['teacher']} and gives {capabilities_of(manifest).text()}"
            for name, (folder, manifest) in self.folders.items()
        ]

    def check_data(self, data: Any) -> None:
        """Stored scores belong to one set of data. Raises RunProblem OPD733."""
        for name, (folder, manifest) in self.folders.items():
            if manifest.get("data") != data.fingerprint:
                raise problem(
                    "OPD733",
                    f"teacher {name}: the scores in {folder} were written for other data"
                    f" than {data.name}",
                    notes=[
                        f"theirs {_short(manifest.get('data'))}, here {_short(data.fingerprint)}"
                    ],
                    helps=["write them again with `opdsl score` and this --data"],
                )

    # ---- teachers ----------------------------------------------------------------------------

    def teacher(
        self,
        name: str,
        view: Callable[[Any], Sequence[int]],
        device: Any,
        vocabulary: int,
        fused: bool,
        needed: Callable[[Any], bool],
        say: Callable[[str], None],
    ) -> RemoteTeacher | StoredTeacher:
        """The teacher of one role."""
        if name in self.folders:
            folder, manifest = self.folders[name]
            top = wants(self.spec)[name].top
            return StoredTeacher(name, folder, manifest, view, device, top, needed)
        return RemoteTeacher(
            name,
            self.links[name],
            view,
            device,
            vocabulary,
            fused=fused,
            patience=Patience.parse(self.settings.teacher_failure or "halt"),
            needed=needed,
            say=say,
        )

    def identity(self) -> dict[str, str]:
        """What a resumed run must find again: the weights, or what is known of them."""
        found = {}
        for name, link in self.links.items():
            server = link.server
            found[f"weights of {name}"] = server.weights or f"served as {server.model}"
        for name, (_, manifest) in self.folders.items():
            found[f"weights of {name}"] = str(manifest.get("weights") or manifest.get("teacher"))
        return found


def open_all(spec: Any, teachers: Mapping[str, str | None], settings: Any) -> Distant:
    """Every teacher outside this process, connected and able to give what the method asks.

    Raises RunProblem OPD402 (address), OPD407 (cannot give it), OPD730 (not there), OPD733.
    """
    Patience.parse(settings.teacher_failure or "halt")
    found, asked = Distant(spec, settings), wants(spec)
    given: dict[str, tuple[str, Capabilities]] = {}
    for name, source in distant(teachers).items():
        if source.kind == "stored":
            manifest = read_manifest(name, source.text)
            _only_known_texts(spec, name, source.text)
            found.folders[name] = source.text, manifest
            given[name] = source.text, capabilities_of(manifest)
        else:
            link = open_link(name, source, asked[name], settings)
            found.links[name] = link
            given[name] = source.text, link.server.capabilities
    refuse_unable(spec, given)
    return found


def _only_known_texts(spec: Any, name: str, folder: str) -> None:
    """Stored scores know the texts of the data and no others."""
    for source in spec.states:
        if source.policy not in ("data", "golden"):
            raise RunProblem(
                make(
                    "OPD407",
                    source.span,
                    f"these states are texts that are not written yet; the teacher `{name}` is"
                    f" bound to stored scores ({folder})",
                    "new texts",
                    helps=[
                        "state sequences(data)",
                        f"--teacher {name}=http://HOST:PORT, or a model: one that answers",
                    ],
                ),
                WRONG_USAGE,
            )


def _same_words(
    name: str, where: str, mine: str | None, theirs: str | None, rows: int, other: int | None,
    code: str = "OPD403",
) -> None:  # fmt: skip
    """Equal tokenizers; without them, equal sizes."""
    if mine is not None and theirs is not None:
        if mine != theirs:
            raise problem(
                code,
                f"student and teacher {name} ({where}) have different tokenizers",
                notes=[f"hash {_short(mine)} here, {_short(theirs)} there"],
                helps=["token-level distillation needs models of one tokenizer family"],
            )
    elif other is not None and other != rows and (mine is None or theirs is not None):
        raise problem(
            code,
            f"student has {rows} vocabulary rows, teacher {name} ({where}) has {other},"
            " and there is no tokenizer to compare",
            helps=["serve the model that belongs to this student"],
        )


def _same_pieces(name: str, where: str, tokenizer: Any, theirs: list[int] | None) -> None:
    mine = list(tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"])
    if theirs is not None and theirs != mine:
        place = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), len(mine))
        raise problem(
            "OPD403",
            f"student and teacher {name} ({where}) have different tokenizers",
            notes=[f"they split the text {PROBE_TEXT.strip()!r} differently at token {place}"],
            helps=["token-level distillation needs models of one tokenizer family"],
        )


def probes(data: Any) -> list[Any]:
    """The prompts a server is examined on."""
    return data.prompts(0, PROBES)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:18] + "…"
