"""`longclip search`, as it is typed."""

import io
import re

import pytest

from longclip.cli import main
from longclip.search.serving import Server


@pytest.fixture
def run(photos, export, tmp_path, capsys):
    def typed(*arguments):
        code = main(
            ["search", str(photos), "--model", str(export), "--cache", str(tmp_path / "c"), *arguments]
        )
        return code, *capsys.readouterr()

    return typed


def test_a_query_is_answered_and_the_second_time_nothing_is_embedded(run, photos, search):
    (photos / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    query = "A red bus waits. Behind it stands a tree."
    code, out, err = run("--query", query, "--top", "3")
    assert code == 0
    assert "6 embedded now" in err
    assert "cannot be read: 1\n  torn.png: image is broken\n" in err
    rows = [line for line in out.splitlines() if ".png" in line]
    best = search(photos).answer(query, 3).results
    assert [result.path in row for result, row in zip(best, rows, strict=True)] == [True] * 3
    assert "2  Behind it stands a tree." in out
    code, again, err = run("--query", query, "--top", "3")
    assert "0 embedded now" in err
    assert again == out


def test_queries_are_read_from_standard_input_and_a_bad_one_ends_nothing(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("A bus.\n\nA tree.\n"))
    code, out, err = run()
    assert code == 0
    assert "1  A bus." in out
    assert "1  A tree." in out
    assert "the query is empty" in err


def test_mistakes_are_sentences(run, tmp_path, export, capsys):
    assert main(["search", str(tmp_path / "none"), "--model", str(export)]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert run("--query", "x", "--cache", "/proc/nothing")[0] == 2
    with pytest.raises(SystemExit):
        run("--top", "0")
    assert "'0' is no whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_the_page_is_served_until_ctrl_c_and_says_who_can_see_it(run, monkeypatch, host, warned):
    def pressed(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", pressed)
    code, out, err = run("--serve", "--host", host, "--port", "0", "--query", "A bus & a tree.")
    assert code == 0
    assert re.search(rf"http://{host}:\d+/\?q=A\+bus\+%26\+a\+tree\. ", out)
    assert ("everybody who reaches this machine" in err) == warned
