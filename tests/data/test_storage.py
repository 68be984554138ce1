"""Reading from anywhere: the right bytes, few requests, bounded time, a bounded cache, no secrets."""

import logging
import logging.handlers
import os
import pickle
import signal
import threading
import time
from itertools import repeat

import numpy as np
import pytest
from servers import Server

from longclip.data.tars import cache, retry, storage
from longclip.data.tars.cache import BlockCache, open_cache
from longclip.data.tars.retry import Missing
from longclip.data.tars.storage import Storage, join
from longclip.types import UserError

BLOCK = 1000


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    monkeypatch.setattr(storage, "BLOCK", BLOCK)
    open_cache.cache_clear()


@pytest.fixture
def content():
    return np.random.RandomState(0).bytes(10 * BLOCK + 345)


@pytest.fixture
def served(tmp_path, content):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(content)
    with Server(tmp_path / "served") as server:
        yield server


def children(count, work):
    """Run `work(number)` in forked processes; all of them must end well."""
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                work(number)
                os._exit(0)
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * count


def test_a_path_a_file_url_and_http_give_the_same_bytes(tmp_path, served, content):
    path = str(tmp_path / "served" / "a.tar")
    for url in (path, f"file://{path}", f"{served.url}/a.tar"):
        assert Storage().read(url, 1234, 777) == content[1234 : 1234 + 777]
        assert Storage().read_all(url) == content
        assert Storage().size(url) == len(content)
        assert Storage().exists(url)
        assert not Storage().exists(url + ".no")
        with pytest.raises(Missing, match=r"a\.tar\.no does not exist"):
            Storage().read(url + ".no", 0, 1)


def test_any_other_address_of_fsspec_is_read(content):
    import fsspec

    fsspec.filesystem("memory").pipe("/folder/a.tar", content)
    assert Storage().read("memory://folder/a.tar", 5, 10) == content[5:15]
    assert Storage().size("memory://folder/a.tar") == len(content)
    with pytest.raises(Missing):
        Storage().read("memory://folder/b.tar", 5, 10)


def test_without_a_cache_a_read_is_one_request_for_its_own_bytes(served, content):
    for offset in (0, 999, 5000):
        assert Storage().read(f"{served.url}/a.tar", offset, 30, len(content), "d") == content[offset:][:30]
    assert served.gets() == [0, 999, 5000]


def test_with_a_cache_neighbours_share_one_request(served, content, tmp_path):
    kept = Storage(cache=str(tmp_path / "cache"))
    for start in range(0, len(content) - 100, 100):
        got = kept.read(f"{served.url}/a.tar", start, 100, len(content), "d")
        assert got == content[start : start + 100]
    assert served.gets() == list(range(0, len(content), BLOCK))
    wide = Storage(cache=str(tmp_path / "other"))
    assert wide.read(f"{served.url}/a.tar", 500, 5000, len(content), "d") == content[500:5500]
    assert wide.read(f"{served.url}/a.tar", 400, 9000, len(content), "d") == content[400:9400]
    assert served.gets()[11:] == [0, 6 * BLOCK], "several missing blocks are one request"


def test_another_digest_is_another_file(served, content, tmp_path):
    kept, url = Storage(cache=str(tmp_path / "cache")), f"{served.url}/a.tar"
    assert kept.read(url, 0, 10, len(content), "old") == content[:10]
    (tmp_path / "served" / "a.tar").write_bytes(content[::-1])
    assert kept.read(url, 0, 10, len(content), "old") == content[:10]
    assert kept.read(url, 0, 10, len(content), "new") == content[::-1][:10]
    assert kept.read(url, 0, 10, len(content), "../../new") == content[::-1][:10]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["cache", "served"], "a digest is data and never a path"


def test_many_processes_fetch_every_block_once(served, content, tmp_path):
    kept, url = Storage(cache=str(tmp_path / "cache")), f"{served.url}/a.tar"

    def work(number):
        for start in np.random.RandomState(number).permutation(len(content) - 50)[:60].tolist():
            assert kept.read(url, start, 50, len(content), "d") == content[start : start + 50]

    children(4, work)
    assert len(served.gets()) == len(set(served.gets()))
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_the_cache_stays_within_its_size_and_keeps_what_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "RENEW", 0.0)
    kept = BlockCache(tmp_path / "cache", limit=20_000)
    for number in range(200):
        kept.put(f"{number:03d}", bytes(1000))
        assert kept.get("000", 10, 20) == bytes(20)
    files = [path for path in (tmp_path / "cache").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 22_000
    assert {"000", "199"} <= {path.name for path in files}
    assert kept.get("001", 0, 10) is None
    assert kept.get("199", 995, 10) is None, "a block that is too short is as good as none"


def test_a_killed_process_leaves_no_lock_and_its_half_block_goes(tmp_path, monkeypatch):
    kept = BlockCache(tmp_path / "cache", limit=10_000)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with kept.claim("block", 5):
            (tmp_path / "cache" / "block.x.partial").write_bytes(b"half")
            os.write(writing, b"!")
            signal.pause()
    os.read(reading, 1)
    with kept.claim("block", 0.05):
        pass  # held by another process: goes on without after a moment
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    begun = time.monotonic()
    with kept.claim("block", 60):
        assert time.monotonic() - begun < 30, "the lock of a dead process is still held"
    monkeypatch.setattr(cache, "STALE", -1.0)
    kept.sweep()
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_full_disk_does_not_stop_reading(served, content, tmp_path, caplog):
    """RLIMIT_FSIZE makes the kernel refuse every write, as a full disk does."""
    import resource

    kept, url, told = Storage(cache=str(tmp_path / "cache")), f"{served.url}/a.tar", tmp_path / "told"
    told.touch()

    def work(_):
        logging.getLogger("longclip").addHandler(handler := logging.handlers.BufferingHandler(100))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        for start in (0, 100, 5000):
            assert kept.read(url, start, 10, len(content), "d") == content[start : start + 10]
        (warning,) = handler.buffer
        assert "cannot be written (File too large): reading goes on without it" in warning.getMessage()

    children(1, work)
    assert served.gets() == [0, 100, 5000]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["locks"]


def test_a_cache_that_cannot_be_made_is_one_warning(served, content, tmp_path, caplog):
    (tmp_path / "file").touch()
    kept = Storage(cache=str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        for start in (0, 3000):
            assert kept.read(f"{served.url}/a.tar", start, 10, len(content), "d") == content[start:][:10]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("answers", [[503, 503], ["cut"], [429], ["cut", 500, 503]])
def test_what_passes_is_waited_for(served, content, answers):
    served.answer("a.tar", answers)
    assert Storage().read(f"{served.url}/a.tar", 10, 2000) == content[10:2010]
    assert len(served.gets()) == len(answers) + 1


def test_a_server_that_never_recovers_is_one_sentence(served):
    served.answer("a.tar", repeat(503))
    with pytest.raises(UserError, match=r"a\.tar cannot be read: status 503, after 4 attempts in 0 s; ") as e:
        Storage(retries=3).read(f"{served.url}/a.tar", 0, 10)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="cannot be read: status 503"):
        Storage(retries=1).size(f"{served.url}/a.tar")


def test_a_slow_server_costs_no_more_than_the_deadline(served):
    served.answer("a.tar", repeat("slow"))
    begun = time.monotonic()
    with pytest.raises(UserError, match="cannot be read: no answer in time, after 2 attempts"):
        Storage(retries=1, deadline=0.4).read(f"{served.url}/a.tar", 0, 10)
    assert time.monotonic() - begun < 20, "bounded by the deadline, not by the server's thirty seconds"


def test_one_slow_answer_leaves_time_for_another(served, content):
    served.answer("a.tar", ["slow"])
    assert Storage(deadline=1.0).read(f"{served.url}/a.tar", 0, 10) == content[:10]


def test_no_server_at_all_is_one_sentence():
    with pytest.raises(UserError, match="cannot be read: Client"):
        Storage(retries=1).read("http://127.0.0.1:9/a.tar", 0, 10)
    with pytest.raises(UserError, match="cannot be read: "):
        Storage(retries=1).size("http://127.0.0.1:9/a.tar")


@pytest.mark.parametrize("status", [401, 403])
def test_refusals_are_not_repeated(served, status):
    served.answer("a.tar", repeat(status))
    with pytest.raises(UserError, match=f"is refused \\(status {status}\\); check the credentials"):
        Storage().read(f"{served.url}/a.tar", 0, 10)
    assert len(served.asked) == 1


def test_a_server_that_ignores_ranges_is_named(served):
    served.answer("a.tar", repeat("whole"))
    with pytest.raises(UserError, match=r"the server ignores ranges .*data=stream"):
        Storage().read(f"{served.url}/a.tar", 10, 10)


def test_secrets_are_in_no_message(served):
    served.answer("a.tar", repeat(503))
    host = served.url.removeprefix("http://")
    for url in (f"http://user:secret@{host}/a.tar", f"{served.url}/a.tar?signature=secret"):
        for path in (url, url.replace("a.tar", "b.tar"), url.replace("http", "nosuch")):
            with pytest.raises(UserError) as caught:
                Storage(retries=0).read(path, 0, 10)
            assert "secret" not in str(caught.value)
            assert caught.value.__cause__ is None


def test_shell_and_unknown_protocols_are_refused(tmp_path):
    with pytest.raises(UserError, match="pipe: addresses run a program"):
        Storage().read(f"pipe:touch {tmp_path}/ran", 0, 10)
    with pytest.raises(UserError, match="cannot read nosuch addresses here"):
        Storage().read_all("nosuch://host/a.tar")
    assert not (tmp_path / "ran").exists()


def test_storage_travels_to_workers(served, content, tmp_path):
    kept, url = Storage(cache=str(tmp_path / "cache")), f"{served.url}/a.tar"
    assert kept.read(url, 0, 10, len(content), "d") == content[:10]
    assert pickle.loads(pickle.dumps(kept)) == kept

    def work(number):
        assert kept.read(url, 2000 * number, 10, len(content), "d") == content[2000 * number :][:10]

    children(3, work)
    results = []

    def read(start):
        results.append(kept.read(url, start, 9, len(content), "d") == content[start : start + 9])

    threads = [threading.Thread(target=read, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8


def test_a_query_stays_behind_the_name():
    assert join("http://h/f?key=1", "a.tar") == "http://h/f/a.tar?key=1"
    assert join("folder/", "a.tar") == "folder/a.tar"


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"deadline": 0}, {"cache_gb": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match="retries must be 0 or more, the others above 0"):
        Storage(**wrong)
