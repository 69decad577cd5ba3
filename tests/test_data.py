"""Data of one's own: formats, columns, bad rows with their numbers, large files, fingerprints."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import tracemalloc

import pytest
from support.texts import tokenizer

from opdsl.train import data_formats, data_load, rows
from opdsl.train.data import FileData, FileOptions
from opdsl.train.errors import RunProblem
from opdsl.train.rows import Fault, check_row, decode, parse_columns

TOKENIZER = tokenizer()
ROWS = [
    {"prompt": f"w{i} w{i + 1}", "reference": str(i), "domain": "math" if i % 2 else "code"}
    for i in range(12)
]


def load(path, eval_path=None, **options) -> FileData:
    options = {"context": 64, "max_new_tokens": 8} | options
    return FileData(str(path), TOKENIZER, FileOptions(**options), eval_path and str(eval_path))


def refused(path, **options) -> str:
    """The one message of a file that is refused, with its helps."""
    with pytest.raises(RunProblem) as caught:
        load(path, **options)
    found = caught.value.diagnostic
    return " ".join([found.code, found.message, *found.notes, *found.helps])


def lines(rows_) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows_)


def as_csv(rows_, delimiter=",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, rows_[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows_)
    return out.getvalue().encode()


def shown(data: FileData):
    """What a run sees of the data, in the order of the file."""
    found = sorted(data.prompts(0, data.rows), key=lambda e: e.index)
    return [(e.ids, e.reference, e.fields.get("domain"), e.golden) for e in found]


# ---- formats -----------------------------------------------------------------------------------

FORMATS = {
    "a.jsonl": lines(ROWS),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(ROWS),
    "crlf.jsonl": lines(ROWS).replace(b"\n", b"\r\n"),
    "unended.jsonl": lines(ROWS)[:-1],
    "gaps.ndjson": lines(ROWS).replace(b"\n", b"\n\n  \n"),
    "no-ending": lines(ROWS),
    "list.json": json.dumps(ROWS).encode(),
    "pretty.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode(),
    "wrapped.json": json.dumps({"data": ROWS, "version": 1}).encode(),
    "really-lines.json": lines(ROWS),
    "a.csv": as_csv(ROWS),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(ROWS),
    "a.tsv": as_csv(ROWS, "\t"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_text_format_gives_the_same_prompts(tmp_path, name):
    (tmp_path / "plain.jsonl").write_bytes(lines(ROWS))
    path = tmp_path / name
    path.write_bytes(FORMATS[name])
    data = load(path)
    assert shown(data) == shown(load(tmp_path / "plain.jsonl"))
    assert data.fingerprint == "file:" + hashlib.sha256(FORMATS[name]).hexdigest()


def test_the_fingerprint_is_that_of_the_bytes_of_data_and_evaluation_data(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS[:3]))
    found = load(tmp_path / "a.jsonl", tmp_path / "b.jsonl").fingerprint
    assert found == "file:" + hashlib.sha256(lines(ROWS) + lines(ROWS[:3])).hexdigest()


@pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="needs the extra `data`")
def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    nested = [{**r, "meta": {"level": i}, "picture": b"\xff"} for i, r in enumerate(ROWS)]
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "a.parquet", row_group_size=5)
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    data = load(tmp_path / "a.parquet", columns="level=meta.level")
    assert shown(data) == shown(load(tmp_path / "a.jsonl"))
    first = min(data.prompts(0, 12), key=lambda e: e.index)
    assert first.fields["level"] == "0" and "picture" not in first.fields
    again = pa.Table.from_pylist([{k: v for k, v in r.items() if k != "picture"} for r in nested])
    pq.write_table(again, tmp_path / "b.parquet", compression="gzip")
    assert load(tmp_path / "b.parquet").fingerprint == data.fingerprint, "of values, not of bytes"
    bad = [*ROWS[:3], {"prompt": None}, {"prompt": "w1", "reference": "nan"}]
    pq.write_table(pa.Table.from_pylist(bad), tmp_path / "bad.parquet")
    assert "row 4: no `prompt`" in refused(tmp_path / "bad.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    assert refused(tmp_path / "cut.parquet").startswith("OPD702 cannot read")
    (tmp_path / "named.jsonl").write_bytes((tmp_path / "a.parquet").read_bytes())
    assert "*.parquet" in refused(tmp_path / "named.jsonl")


@pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="needs the extra `data`")
def test_folders_and_names_of_the_datasets_library(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    expected = shown(load(tmp_path / "a.jsonl"))
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "saved")
    assert shown(load(tmp_path / "saved")) == expected
    parts = datasets.DatasetDict({"test": whole.select(range(3)), "dev": whole})
    parts.save_to_disk(tmp_path / "parts")
    assert "split=NAME with one of: test, dev" in refused(tmp_path / "parts")
    assert shown(load(f"{tmp_path / 'parts'},split=dev")) == expected
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_bytes(lines(ROWS))
    assert shown(load(tmp_path / "files")) == expected
    message = refused("nobody/no-such-set")
    assert message.startswith("OPD702 cannot read the data set nobody/no-such-set")


def test_a_missing_library_is_one_message_with_the_cure(tmp_path, monkeypatch):
    from opdsl.train import data_tables

    monkeypatch.setattr(data_tables, "find_spec", lambda name: None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for what, package in [
        (tmp_path / "folder", "datasets"), ("org/name", "datasets"),
        ("org/name,split=test,config=main", "datasets"), (tmp_path / "a.parquet", "pyarrow"),
    ]:  # fmt: skip
        message = refused(what)
        assert f"needs the package {package}" in message and "opdsl[data]" in message


def test_what_is_a_file_and_what_a_name(tmp_path):
    for name in ("a/b.jsonl", "./a/b", "../no/such", "a/b/c", "x" * 5000, "a\0b"):
        assert refused(name).startswith("OPD702 cannot read the data file"), name
    assert (
        refused("/dev/zero").startswith("OPD702") and data_formats.stem("org/set,split=a") == "set"
    )
    assert data_formats.stem("dir/train.jsonl") == "train"
    (tmp_path / "a,b.jsonl").write_bytes(lines(ROWS))
    assert load(tmp_path / "a,b.jsonl").rows == 12


# ---- columns and chats ---------------------------------------------------------------------------


def test_columns_are_mapped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([
        {"question": "w1", "solution": {"final": 4}, "subject": "algebra", "level": 3, "hard": True}
    ]))  # fmt: skip
    message = refused(path)
    assert "line 1: no `prompt`" in message and "question, solution, subject" in message
    data = load(path, columns="prompt=question, reference=solution.final, domain=subject",
                required_fields=("domain",))  # fmt: skip
    (example,) = data.prompts(0, 1)
    assert example.reference == "4" and data.prompt_text(example) == "w1"
    expected = {"domain": "algebra", "subject": "algebra", "level": "3", "hard": "true"}
    assert example.fields == expected
    assert "no `queston`" in refused(path, columns="prompt=queston")
    for bad in ("prompt", "prompt=", "=x", "prompt=a,prompt=b", "pro mpt=x"):
        assert refused(path, columns=bad).startswith("OPD112")
    assert parse_columns("a=b=c") == {"a": "b=c"} and parse_columns(None) == {}


def test_chats():
    def row(*messages, **more):
        try:
            return check_row(decode(json.dumps({"prompt": list(messages), **more})), {})
        except Fault as fault:
            return str(fault)

    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert row(user, answer, user)["response"] is None
    found = row(user, answer)
    assert found["messages"] == (user,) and found["response"] == "b"
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    assert row(parts)["messages"][0]["content"] == "ab"
    assert "ends with an assistant" in row(user, answer, response="c")
    assert "alone" in row(answer)
    for bad in ({"role": "user"}, {"role": 1, "content": "a"}, {"role": " ", "content": "a"}, "a",
                {"role": "user", "content": [{"type": "image"}]}):  # fmt: skip
        assert "messages" in row(bad)


def test_a_chat_template_that_refuses_a_row_names_it(tmp_path):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m['content'] }} {% endfor %}"
    )
    rows_ = [
        {"prompt": "w1"},
        {"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(rows_))
    with pytest.raises(RunProblem, match=r"line 2: the chat template refuses it .no system"):
        FileData(str(path), tokenizer(template=template), FileOptions(context=64, max_new_tokens=8))


# ---- bad rows ------------------------------------------------------------------------------------

BAD = {  # content of a .jsonl, and what the message says
    "nan": (b'{"prompt": "a", "reference": NaN}\n', "line 1: not JSON (NaN is not a JSON number)"),
    "inf": (b'{"prompt": "a", "x": -Infinity}\n', "-Infinity is not a JSON number"),
    "huge": (b'{"prompt": "a", "reference": 1e999}\n', "`reference` is not a finite number"),
    "twice": (b'{"prompt": "a", "prompt": "b"}\n', "the key `prompt` is there twice"),
    "nested-twice": (b'{"prompt": "a", "m": {"k": 1, "k": 2}}\n', "the key `k` is there twice"),
    "nul": (b'{"prompt": "a\\u0000b"}\n', "line 1: a NUL character"),
    "raw-nul": (b'{"prompt": "a\0b"}\n', "not JSON"),
    "nuls": (b"\0" * 4096, "line 1: not JSON"),
    "latin": ('{"prompt": "ok"}\n{"prompt": "é"}\n'.encode("latin-1"), "line 2: not UTF-8 (byte 13)"),
    "utf16": ('{"prompt": "a"}\n'.encode("utf-16"), "looks like UTF-16"),
    "utf16-bare": ('{"prompt": "a"}\n'.encode("utf-16-le"), "looks like UTF-16"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", "packed (gzip)"),
    "digits": (b'{"prompt": "a", "reference": ' + b"1" * 5000 + b"}\n", "not JSON"),
    "deep": (b'{"prompt": ' + b"[" * 100_000 + b"\n", "nested too deeply"),
    "empty": (b"", "no usable row: it is empty"),
    "only-bom": (b"\xef\xbb\xbf", "no usable row"),
    "escape": (b'{"\x1b[2J": 1, "\\u001b[2J": 2, "\\u001b[2J": 3}\n', "line 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_get_one_message(tmp_path, name):
    content, expected = BAD[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    message = refused(path)
    assert expected in message and "\x1b" not in message and len(message) < 1000


BAD_OTHERS = {
    "list.json": (b'[{"prompt": "a"},\n {"prompt": 3}]', "line 2: `prompt` is neither"),
    "broken.json": (b'[{"prompt": "a"},\n {"prompt": ', "line 2: not JSON"),
    "unended.json": (b'[{"prompt": "a"},', "the list does not end"),
    "more.json": (b'[{"prompt": "a"}] x', "something follows the end of the list"),
    "text.json": (b"hello", "neither a list nor an object"),
    "latin.json": ('[{"prompt": "é"}]'.encode("latin-1"), "not UTF-8"),
    "deep.json": (b"[" * 100_000, "nested too deeply"),
    "twice.json": (b'[{"prompt": "a"},\n\n{"prompt": "a", "prompt": "b"}]', "line 3: the key"),
    "empty.json": (b"  \n", "no usable row"),
    "cells.csv": (b"prompt,reference\na,1\nb\n", "line 3: 1 cells, and 2 names in line 1"),
    "quote.csv": (b'prompt,reference\na,1\n"b,2\n', "not CSV"),
    "latin.csv": ("prompt\na\né\n".encode("latin-1"), "line 3: not UTF-8"),
    "names.csv": (b"prompt,a,a\n1,2,3\n", "hold `a` twice"),
    "head.csv": (b"prompt,reference\n", "no usable row"),
    "nul.csv": (b"prompt\na\0b\n", "line 2: a NUL character"),
    "lines.csv": (b'prompt,reference\n"a\nb",1\n,2\n', "line 4: no `prompt`"),
}


@pytest.mark.parametrize("name", BAD_OTHERS)
def test_bad_json_and_csv_get_one_message(tmp_path, name):
    content, expected = BAD_OTHERS[name]
    (tmp_path / name).write_bytes(content)
    assert expected in refused(tmp_path / name)


def test_bad_rows_are_left_out_by_choice_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS) + b"{\n" * 9 + b'{"prompt": NaN}\n' + lines(ROWS[:1]))
    message = refused(path)
    assert "10 bad rows: line 13: not JSON" in message and "and 5 more" in message
    data = load(path, skip_bad_rows=True)
    assert data.rows == 13 and "10 bad rows left out (line 13" in data.notes[0]


def test_a_line_past_the_limit_is_a_bad_row_and_the_rest_is_read(tmp_path, monkeypatch):
    for module in (rows, data_formats):
        monkeypatch.setattr(module, "MAX_ROW", 1000)
    content = lines(ROWS[:2]) + b'{"prompt": "' + b"w1 " * 1000 + b'"}\n' + lines(ROWS[2:4])
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert "line 3: longer than" in refused(path)
    data = load(path, skip_bad_rows=True)
    assert data.rows == 4
    assert data.fingerprint == "file:" + hashlib.sha256(content).hexdigest(), "it is hashed as well"
    (tmp_path / "a.json").write_bytes(b"[" + content.replace(b"\n", b",")[:-1] + b"]")
    assert "longer than" in refused(tmp_path / "a.json", skip_bad_rows=False)


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_json_that_comes_in_small_pieces(tmp_path, monkeypatch, piece):
    """Rows, characters of several bytes and line numbers survive any cut."""
    monkeypatch.setattr(data_formats, "PIECE", piece)
    text = json.dumps([{"prompt": f"w{i} é漢🙂", "n": -1.5e3} for i in range(30)], indent=1,
                      ensure_ascii=False)  # fmt: skip
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    found = sorted(load(tmp_path / "a.json").prompts(0, 30), key=lambda e: e.line)
    assert [e.line for e in found] == [2 + 4 * i for i in range(30)]
    assert all(e.messages[0]["content"].endswith(" é漢🙂") for e in found)


# ---- size, batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path, ending):
    """Reading needs the memory of the rows it keeps, not that of the file: here every row carries
    ballast that nothing asks for."""
    ballast = [{"prompt": "w1 w2", "ballast": ["x" * 50_000]} for _ in range(400)]
    path = tmp_path / f"big.{ending}"
    if ending == "csv":
        path.write_text("prompt\n" + "\n".join("w1 w2" + " " * 50_000 for _ in range(400)))
    else:
        path.write_bytes(lines(ballast) if ending == "jsonl" else json.dumps(ballast).encode())
    assert path.stat().st_size > 20e6
    seen, tracker = 0, hashlib.sha256()
    tracemalloc.start()
    for found in data_formats.open_source(str(path)).read(tracker):
        seen += found.row is not None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == 400 and peak < 8e6, peak
    assert tracker.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_batch_is_a_function_of_seed_and_step(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS))
    one, two = load(path), load(path)
    later = [e.line for e in one.prompts(7, 5)]
    for step in (3, 0, 7):
        assert [e.line for e in two.prompts(step, 5)] == [e.line for e in one.prompts(step, 5)]
    assert [e.line for e in two.prompts(7, 5)] == later
    first_pass = [e.line for step in range(3) for e in one.prompts(step, 4)]
    assert sorted(first_pass) == list(range(1, 13)), "every row once a pass"
    assert [e.line for e in load(path, seed=1).prompts(7, 5)] != later


def test_responses_and_templates(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"prompt": "w1", "response": "w3 " * 20}, {"prompt": "w2"}]))
    data = load(path)
    assert [len(e.golden) for e in data.golden(0, 2)] == [8, 8] and data.rows == 2
    assert "no `response`" in refused(path, needs_response=True)
    assert data_load.prompt_ids(TOKENIZER, [{"role": "user", "content": "w1"}]) == (5,)
