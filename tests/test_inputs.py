"""Through the real command line: files, folders, pipes, links, standard input; colour and width."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import mutate

from opdsl.cli import cli
from opdsl.syntax import MAX_BYTES

GKD = (mutate.ROOT / "specs" / "gkd.opd").read_text(encoding="utf-8")
BROKEN = GKD.replace("feedback", "feedbak")
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def opdsl(*words: str | Path, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, output captured (so not a terminal)."""
    command = [sys.executable, "-m", "opdsl", *map(str, words)]
    done = subprocess.run(
        command, input=stdin, capture_output=True, timeout=30, env={**os.environ, **env}
    )
    out, err = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
    assert "Traceback" not in err and "OPD900" not in err and done.returncode != 70, err
    return subprocess.CompletedProcess(command, done.returncode, out, err)


def codes(text: str) -> list[str]:
    return re.findall(r"^(?:error|warning)\[(OPD\d+)\]", text, re.MULTILINE)


# ---- what a name can be ------------------------------------------------------------------


@pytest.fixture
def places(tmp_path) -> Path:
    """A folder with everything a path can lead to."""
    (tmp_path / "good.opd").write_text(GKD)
    (tmp_path / "broken.opd").write_text(BROKEN)
    (tmp_path / "bom.opd").write_bytes(b"\xef\xbb\xbf" + GKD.encode())
    (tmp_path / "empty.opd").write_bytes(b"")
    (tmp_path / "comments.opd").write_text("# nothing\n")
    (tmp_path / "latin.opd").write_bytes("opd 1 # é\n".encode("latin-1"))
    (tmp_path / "utf16.opd").write_bytes(GKD.encode("utf-16"))
    (tmp_path / "zeros.opd").write_bytes(b"\0" * 100)
    (tmp_path / "large.opd").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "folder.opd").mkdir()
    (tmp_path / "link.opd").symlink_to("good.opd")
    (tmp_path / "loop.opd").symlink_to("loop.opd")
    (tmp_path / "dangling.opd").symlink_to("nowhere.opd")
    os.mkfifo(tmp_path / "pipe.opd")
    return tmp_path


EXPECTED = {
    "good.opd": [], "bom.opd": [], "link.opd": [], "broken.opd": ["OPD001"],
    "empty.opd": ["OPD002"], "comments.opd": ["OPD002"], "latin.opd": ["OPD010"],
    "utf16.opd": ["OPD010"], "zeros.opd": ["OPD005"], "large.opd": ["OPD008"],
    "folder.opd": ["OPD017"], "loop.opd": ["OPD017"], "dangling.opd": ["OPD017"],
    "pipe.opd": ["OPD017"], "gone.opd": ["OPD017"], "gone/gone.opd": ["OPD711"],
    "x" * 5000: ["OPD711"], "x" * 300 + ".opd": ["OPD017"], ".": ["OPD017"],
    "/dev/null": ["OPD017"], "/dev/zero": ["OPD017"],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED, ids=lambda name: name[:20])
def test_every_kind_of_path_gets_an_answer(places, name, monkeypatch):
    monkeypatch.chdir(places)
    for command in ("check", "explain", "fmt"):
        done = CliRunner().invoke(cli, [command, name])
        expected = EXPECTED[name]
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            found = [d.code for d in done.exception.diagnostics]  # what `main` prints
        else:
            found = codes(done.stderr)
        assert found[: len(expected)] == expected and bool(found) == bool(expected), done.stderr
        assert len(done.stderr) < 20_000


def test_the_same_in_a_process(places):
    for name in ("pipe.opd", "loop.opd", "zeros.opd", "folder.opd", "x" * 5000):
        for command in ("check", "explain", "fmt"):
            done = opdsl(command, places / name)
            assert done.returncode == 1 and codes(done.stderr), done.stderr
    assert opdsl("check", places / "good.opd", places / "broken.opd").returncode == 1
    assert opdsl("check", places / "good.opd", "gkd").returncode == 0


def test_imports_of_every_kind_of_path(places):
    rows = [f'import "./{name}" (m)' for name in EXPECTED if name not in ("good.opd", "/dev/null")]
    for row in [*rows, 'import "./a\0b.opd" (m)', "import no.such.place (m)"]:
        (places / "main.opd").write_text(f"opd 1\n{row}\n{GKD.removeprefix('opd 1')}")
        done = opdsl("check", places / "main.opd")
        clean = any(word in row for word in ("bom", "link"))
        assert done.returncode == 1 and len(codes(done.stderr)) >= 1, row
        assert not clean or codes(done.stderr) == ["OPD115"], row


def test_standard_input():
    assert opdsl("check", "-", stdin=GKD.encode()).returncode == 0
    assert opdsl("check", "-", stdin=b"\xef\xbb\xbf" + GKD.encode()).returncode == 0
    assert codes(opdsl("check", "-", stdin=BROKEN.encode()).stderr) == ["OPD001"]
    for data, code in [
        (b"", "OPD002"), (b"\xff\xfe\0", "OPD010"), (b"#" * 5_000_000, "OPD008"),
        (b"(" * 100_000, "OPD009"), (b"\0\n\r\x1b[2J", "OPD005"),
    ]:  # fmt: skip
        for command in ("check", "explain", "fmt"):
            done = opdsl(command, "-", stdin=data)
            assert codes(done.stderr)[0] == code and done.returncode == 1, (code, done.stderr)
            assert "\x1b" not in done.stderr and len(done.stderr) < 20_000
    text = opdsl("fmt", "-", stdin=GKD.encode()).stdout
    assert opdsl("fmt", "-", stdin=text.encode()).stdout == text
    assert opdsl("explain", "-", stdin=GKD.encode()).stdout.startswith("gkd ")


def test_a_closed_standard_input_and_a_deleted_folder(tmp_path):
    run = f"{sys.executable} -m opdsl check"
    done = subprocess.run(f"{run} - <&-", shell=True, capture_output=True, text=True)
    assert done.returncode == 1 and codes(done.stderr) == ["OPD002"]
    script = f"cd {tmp_path} && mkdir gone && cd gone && rmdir ../gone && {run} gkd"
    done = subprocess.run(script, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the formatter on disk ---------------------------------------------------------------


def test_formatting_writes_through_a_link_and_keeps_the_mode(places):
    target = places / "good.opd"
    target.write_text(GKD.replace("  support", "    support"))
    target.chmod(0o640)
    assert opdsl("fmt", places / "link.opd").returncode == 0
    assert (places / "link.opd").is_symlink() and target.stat().st_mode & 0o777 == 0o640
    assert "\n  support" in target.read_text()
    assert opdsl("fmt", "--check", places / "link.opd").returncode == 0


def test_a_file_that_cannot_be_written_gets_a_message(places, monkeypatch):
    from opdsl.cli import fmt
    from opdsl.diagnostics import CompileError

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fmt.tempfile, "mkstemp", full)
    with pytest.raises(CompileError, match="OPD704 I cannot write"):
        fmt.write_atomically(places / "good.opd", "text")
    assert (places / "good.opd").read_text() == GKD


# ---- how it looks ------------------------------------------------------------------------


def test_no_escape_sequences_away_from_a_terminal(places):
    for words in (["check", places / "broken.opd"], ["explain", "OPD302"], ["explain", "gkd"]):
        done = opdsl(*words)
        assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": "xterm"}], ids=str)
@pytest.mark.parametrize("words", ["check broken.opd", "explain OPD302"])
def test_colour_on_a_terminal_of_eighty_columns(places, env, words):
    """`script` gives the command a terminal; colour is there unless it is refused."""
    import pty
    import select

    command = [sys.executable, "-m", "opdsl", *words.split()]
    settings = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "COLUMNS")}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(places)
        os.execve(sys.executable, command, {"TERM": "xterm", **settings, **env})
    out = b""
    while select.select([terminal], [], [], 20)[0]:
        try:
            piece = os.read(terminal, 4096)
        except OSError:
            break
        if not piece:
            break
        out += piece
    os.waitpid(pid, 0)
    os.close(terminal)
    text = out.decode("utf-8").replace("\r\n", "\n")
    assert ("\x1b[" in text) == (env == {"TERM": "xterm"})
    plain = ESCAPE.sub("", text)
    assert "teacher_free_gradient" in plain or "unknown_section" in plain
    assert max(len(line) for line in plain.splitlines()) <= 80


def test_formats_for_machines(places):
    done = opdsl("check", "--format", "json", places / "broken.opd", places / "empty.opd")
    assert [d["code"] for d in json.loads(done.stdout)] == ["OPD001", "OPD002"]
    done = opdsl("check", "--format", "github", places / "broken.opd")
    assert done.stdout.startswith("::error file=") and done.stdout.count("\n") == 1
    assert json.loads(opdsl("check", "--format", "json", places / "good.opd").stdout) == []


def test_a_sample_of_the_fuzzed_inputs_through_the_command_line(tmp_path):
    place = tmp_path / "fuzz.opd"
    for _, item in mutate.stream(0, 40):
        place.write_text(item.text, encoding="utf-8", errors="replace")
        for command in ("check", "explain"):
            done = CliRunner().invoke(cli, [command, str(place)])
            refused = done.exception is not None and hasattr(done.exception, "diagnostics")
            assert refused or done.exit_code in (0, 1), (item.kind, done.exception)
