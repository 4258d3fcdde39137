"""Downloads against a local server that behaves, breaks off, lies, or shows a web page."""

import hashlib
import logging
import re
import socket
import threading
import urllib.error
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from fastres.data import download
from fastres.data.download import Remote, download_cifar, remotes
from fastres.data.readers.cifar import archive_formats
from fastres.errors import FailureError

ARCHIVE = b"\x1f\x8b" + np.random.default_rng(0).bytes(1_000_000)
NAME = "cifar-10-binary.tar.gz"
PAGE = b"<!DOCTYPE html><html>503 Service Unavailable</html>"


class Handler(BaseHTTPRequestHandler):
    """The path says how the server behaves; /breaks sends half of what is asked."""

    def __init__(self, log: list[tuple[str, str | None]], *args: object) -> None:
        self.log = log
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.log.append((self.path, asked))
        body = {
            "/html": PAGE,
            "/wrong": ARCHIVE[:-1] + b"\0",
            "/long": ARCHIVE + b"\0" * 1_000_000,
            "/notgzip": ARCHIVE[1:],
        }.get(self.path, ARCHIVE)
        if self.path == "/missing":
            self.send_error(404)
            return
        start = 0
        if asked and self.path not in ("/norange", "/html"):
            match = re.fullmatch(r"bytes=(\d+)-", asked)
            assert match is not None
            start = int(match[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        self.wfile.write(rest[: len(rest) // 2] if self.path == "/breaks" else rest)

    def log_message(self, *args: object) -> None:
        pass


Server = Callable[..., tuple[Remote, ...]]


@pytest.fixture
def log() -> list[tuple[str, str | None]]:
    """(path, Range header) of every request, in order."""
    return []


@pytest.fixture
def serve(log: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server, as a function from paths to the remotes there."""
    monkeypatch.delenv("FASTRES_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, log))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    md5 = hashlib.md5(ARCHIVE).hexdigest()

    def remotes_at(*paths: str) -> tuple[Remote, ...]:
        base = f"http://127.0.0.1:{server.server_port}"
        return tuple(Remote(f"{base}{path}", NAME, len(ARCHIVE), md5) for path in paths)

    yield remotes_at
    server.shutdown()
    thread.join()
    server.server_close()


Log = list[tuple[str, str | None]]


def expect_archive_alone(folder: Path, path: Path) -> None:
    assert path == folder / NAME
    assert path.read_bytes() == ARCHIVE
    assert list(folder.iterdir()) == [path]


def test_good(serve: Server, log: Log, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    expect_archive_alone(folder, download_cifar("cifar10", folder, serve("/good", "/missing")))
    assert log == [("/good", None)]


def test_web_page_then_the_next_source(serve: Server, log: Log, tmp_path: Path) -> None:
    sources = serve("/html", "/notgzip", "/missing", "/good")
    expect_archive_alone(tmp_path, download_cifar("cifar10", tmp_path, sources))
    assert [path for path, _ in log] == ["/html", "/notgzip", "/missing", "/good"]


def test_broken_connection_is_resumed(serve: Server, log: Log, tmp_path: Path) -> None:
    expect_archive_alone(tmp_path, download_cifar("cifar10", tmp_path, serve("/breaks", "/good")))
    # A source that still gives something is asked four times, each time for the rest.
    size = len(ARCHIVE)
    starts = [0, size // 2, size - size // 4, size - size // 8, size - size // 16]
    assert [path for path, _ in log] == ["/breaks"] * 4 + ["/good"]
    for (_, asked), start in zip(log, starts, strict=True):
        got = int(asked.removeprefix("bytes=")[:-1]) if asked else 0
        assert abs(got - start) <= 2


def test_an_earlier_attempt_is_resumed(serve: Server, log: Log, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(ARCHIVE[:300_000])
    expect_archive_alone(tmp_path, download_cifar("cifar10", tmp_path, serve("/good")))
    assert log == [("/good", "bytes=300000-")]


def test_a_whole_part_needs_no_request(serve: Server, log: Log, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(ARCHIVE)
    expect_archive_alone(tmp_path, download_cifar("cifar10", tmp_path, serve("/good")))
    assert log == []


def test_server_that_ignores_range(serve: Server, log: Log, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(ARCHIVE[:300_000])
    expect_archive_alone(tmp_path, download_cifar("cifar10", tmp_path, serve("/norange")))
    assert log == [("/norange", "bytes=300000-")]


def test_a_web_page_does_not_cost_what_was_there(serve: Server, tmp_path: Path) -> None:
    part = tmp_path / f"{NAME}.part"
    part.write_bytes(ARCHIVE[:300_000])
    with pytest.raises(FailureError, match="it sent a web page"):
        download_cifar("cifar10", tmp_path, serve("/html"))
    assert part.read_bytes() == ARCHIVE[:300_000]


@pytest.mark.parametrize(
    ("path", "reason"), [("/wrong", "checksum"), ("/long", "more than the published size")]
)
def test_wrong_content_never_gets_the_name(
    path: str, reason: str, serve: Server, tmp_path: Path
) -> None:
    with pytest.raises(FailureError, match=reason):
        download_cifar("cifar10", tmp_path, serve(path))
    # Nothing is left, neither under the name nor for the next source to go on from.
    assert list(tmp_path.iterdir()) == []
    expect_archive_alone(tmp_path, download_cifar("cifar10", tmp_path, serve(path, "/good")))


def test_a_spoilt_part_is_replaced(serve: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(b"\x1f\x8b" + bytes(300_000))
    with pytest.raises(FailureError, match="checksum"):
        download_cifar("cifar10", tmp_path, serve("/good"))
    expect_archive_alone(tmp_path, download_cifar("cifar10", tmp_path, serve("/good")))


def test_all_sources_fail(serve: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The error is one line that says what to do; every URL and its reason go to the log."""
    sources = (*serve("/missing", "/html"), Remote("http://127.0.0.1:1/x", NAME, 1, ""))
    with (
        caplog.at_level(logging.DEBUG, logger="fastres"),
        pytest.raises(FailureError) as caught,
    ):
        download_cifar("cifar10", tmp_path, sources)
    assert str(caught.value) == (
        "CIFAR-10 could not be downloaded (HTTP 404, it sent a web page, Connection refused); put "
        "cifar-10-binary.tar.gz or cifar-10-python.tar.gz into "
        f"{tmp_path} or name its folder with --data-dir"
    )
    for source, reason, line in zip(
        sources, ("HTTP 404", "a web page", "refused"), caplog.messages, strict=True
    ):
        assert source.url in line
        assert reason in line


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_no_network(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Where no mirror's name is known; without a level for `fastres` nothing is printed."""
    monkeypatch.setenv("FASTRES_OFFLINE", "0")

    def find_nothing(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError(socket.gaierror(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr(download.urllib.request, "urlopen", find_nothing)
    with pytest.raises(FailureError, match=r"\(no network\); put cifar-10") as caught:
        download_cifar(name, tmp_path)
    assert "://" not in str(caught.value)
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")
    with caplog.at_level(logging.DEBUG, logger="fastres"), pytest.raises(FailureError):
        download_cifar(name, tmp_path)
    assert all(
        source.url in line for source, line in zip(remotes(name), caplog.messages, strict=True)
    )


def test_second_process_finds_the_archive(serve: Server, log: Log, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(ARCHIVE)
    expect_archive_alone(tmp_path, download_cifar("cifar10", tmp_path, serve("/good")))
    assert log == []


def test_two_at_once_fetch_once(serve: Server, log: Log, tmp_path: Path) -> None:
    sources = serve("/good")
    fetch = partial(download_cifar, "cifar10", tmp_path, sources)
    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expect_archive_alone(tmp_path, tmp_path / NAME)
    assert len(log) == 1


def test_folder_that_cannot_be_made(serve: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FailureError, match="cannot write to"):
        download_cifar("cifar10", tmp_path / "file" / "data", serve("/good"))


def test_offline(serve: Server, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_OFFLINE", "1")
    with pytest.raises(FailureError, match="FASTRES_OFFLINE"):
        download_cifar("cifar10", tmp_path, serve("/good"))
    monkeypatch.setenv("FASTRES_OFFLINE", "0")
    download_cifar("cifar10", tmp_path, serve("/good"))
    assert len(log) == 1


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_known_sources(name: str) -> None:
    """Every mirror must give a file that the reader knows under the same checksum."""
    known = {fmt.archive: fmt for fmt in archive_formats(name)}
    found = remotes(name)
    assert len({source.url.split("/")[2] for source in found}) == len(found) >= 3
    assert "www.cs.toronto.edu" in found[0].url
    for source in found:
        assert source.url.startswith("https://")
        assert source.url.endswith(source.archive)
        assert (source.size, source.md5) == (
            known[source.archive].size,
            known[source.archive].md5,
        )
    assert download.offline()  # the tests' own setting, so that nothing here reaches out
