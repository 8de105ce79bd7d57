import base64
import hashlib
import http.server
import json
import threading
import urllib.parse

import pytest

from experiments.data import DataError, TextData, documents, load, manifest, pg19

BOOKS = {
    "train/1.txt": "A long book. " * 40_000,
    "train/22.txt": "Größe und Güte.\n" * 3_000,
    "train/333.txt": "x",
    "train/4.txt": "The last one.\n" * 100,
    "validation/5.txt": "Held out.\n" * 50,
    "test/6.txt": "Tested.\n" * 50,
}


class Bucket(http.server.ThreadingHTTPServer):
    """The listing and the objects of a bucket, with faults to order."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects = {name: text.encode() for name, text in BOOKS.items()}
        self.requests = []  # (name, Range header or None, bytes sent)
        self.page = 2  # objects of one page of the listing
        self.ranges = True
        self.cut = {}  # name: how many more answers break off in the middle
        self.spoil = {}  # name: how many more answers have a wrong byte
        self.status = {}  # name: statuses of the next answers
        self.listing = None  # replaces the listing
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/storage/v1/b/deepmind-gutenberg/o":
            self._list(urllib.parse.parse_qs(url.query))
        else:
            self._object(url.path.removeprefix("/deepmind-gutenberg/"))

    def _list(self, query):
        names = sorted(n for n in self.server.objects if n.startswith(query["prefix"][0]))
        start = int(query.get("pageToken", ["0"])[0])
        stop = start + self.server.page
        items = []
        for name in names[start:stop]:
            data = BOOKS.get(name, "").encode()
            md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
            items.append({"name": name, "size": str(len(data)), "md5Hash": md5})
        page = {"items": items} if items else {}
        if stop < len(names):
            page["nextPageToken"] = str(stop)
        body = json.dumps(page).encode() if self.server.listing is None else self.server.listing
        self.server.requests.append(("listing", None, len(body)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _object(self, name):
        asked = self.headers.get("Range")
        if self.server.status.get(name):
            self.server.requests.append((name, asked, 0))
            self.send_error(self.server.status[name].pop(0))
            return
        if name not in self.server.objects:
            self.send_error(404)
            return
        whole = self.server.objects[name]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        body = whole[start:]
        self.send_response(206 if asked and self.server.ranges else 200)
        if asked and self.server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.spoil.get(name, 0) > 0:
            self.server.spoil[name] -= 1
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.server.cut.get(name, 0) > 0:
            self.server.cut[name] -= 1
            body = body[: len(body) // 2]
        self.server.requests.append((name, asked, len(body)))
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(pg19, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(pg19, "TIMEOUT_SECONDS", 5.0)
    with Bucket() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def config_of(bucket, tmp_path, source="pg19", **settings):
    return TextData(source=source, pg19_url=bucket.url, data_dir=str(tmp_path), length=64, **settings)


def texts(config, split):
    return {d.name: bytes(d.tokens.tolist()).decode() for d in documents(config, split)}


def of(split):
    return {name: text for name, text in BOOKS.items() if name.startswith(split)}


def asked_for(bucket, name):
    return [(asked, sent) for n, asked, sent in bucket.requests if n == name]


def files(tmp_path):
    root = tmp_path / "downloads" / "pg19"
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def test_all_splits_are_read_and_prepared_once(bucket, tmp_path):
    config = config_of(bucket, tmp_path)
    for split in ("train", "validation", "test"):
        assert texts(config, split) == of(split)
    assert files(tmp_path) == set(BOOKS)
    assert [len(asked_for(bucket, name)) for name in BOOKS] == [1] * len(BOOKS)
    assert len(asked_for(bucket, "listing")) == 4  # two pages of training books
    count = len(bucket.requests)
    assert next(load(config))["tokens"].any()
    assert len(bucket.requests) == count
    described = manifest(config)
    assert described["source"] == "pg19"
    assert {s: v["documents"] for s, v in described["splits"].items()} == {
        "train": 4,
        "validation": 1,
        "test": 1,
    }


def test_the_first_books_only(bucket, tmp_path):
    config = config_of(bucket, tmp_path, "pg19:2")
    assert sorted(texts(config, "train")) == ["train/1.txt", "train/22.txt"]
    assert sorted(texts(config, "test")) == ["test/6.txt"]
    assert not asked_for(bucket, "train/4.txt")
    # More of them later: what is there is not fetched again.
    assert sorted(texts(config_of(bucket, tmp_path, "pg19:3"), "train")) == [*sorted(of("train"))[:3]]
    assert len(asked_for(bucket, "train/1.txt")) == 1


def test_a_broken_connection_goes_on_where_it_stopped(bucket, tmp_path):
    name, size = "train/1.txt", len(BOOKS["train/1.txt"])
    bucket.cut[name] = 2
    assert texts(config_of(bucket, tmp_path), "train") == of("train")
    first, second, third = asked_for(bucket, name)
    assert first == (None, size // 2)
    assert second == (f"bytes={size // 2}-", (size - size // 2) // 2)
    assert third == (f"bytes={size - third[1]}-", size - first[1] - second[1])


def test_an_interrupted_download_is_continued_by_the_next_run(bucket, tmp_path, monkeypatch):
    name, size = "train/1.txt", len(BOOKS["train/1.txt"])
    bucket.cut[name] = 100
    monkeypatch.setattr(pg19, "ATTEMPTS", 1)
    config = config_of(bucket, tmp_path)
    with pytest.raises(DataError, match=r"train/1\.txt: download failed .*run the same command again: it goes on"):
        load(config)
    assert f"{name}.part" in files(tmp_path)
    assert name not in files(tmp_path)
    assert not list(tmp_path.glob("corpora/[!.]*"))
    assert not list(tmp_path.glob("tokens/[!.]*"))
    done = files(tmp_path) & set(BOOKS)
    bucket.cut.clear()
    bucket.requests.clear()
    assert texts(config, "train") == of("train")
    assert [asked for asked, _ in asked_for(bucket, name)] == [f"bytes={size // 2}-"]
    assert not any(asked_for(bucket, other) for other in done)
    assert files(tmp_path) == set(BOOKS)


def test_a_corrupt_file_is_fetched_again(bucket, tmp_path):
    bucket.spoil["train/22.txt"] = 2
    assert texts(config_of(bucket, tmp_path), "train") == of("train")
    assert [asked for asked, _ in asked_for(bucket, "train/22.txt")] == [None] * 3


def test_a_file_that_stays_corrupt_is_never_used(bucket, tmp_path):
    bucket.spoil["train/22.txt"] = 100
    with pytest.raises(DataError, match=r"train/22\.txt: download failed \(the checksum of what arrived is wrong\)"):
        load(config_of(bucket, tmp_path))
    assert not [name for name in files(tmp_path) if name.startswith("train/22.txt")]
    assert len(asked_for(bucket, "train/22.txt")) == pg19.ATTEMPTS


@pytest.mark.parametrize("kind", ["shorter", "longer", "one wrong byte"])
def test_a_wrong_beginning_from_elsewhere_is_noticed(bucket, tmp_path, kind):
    right = BOOKS["train/22.txt"].encode()
    found = {"shorter": b"A wrong beg", "longer": right + b"!", "one wrong byte": right[:-1] + b"!"}[kind]
    part = tmp_path / "downloads" / "pg19" / "train" / "22.txt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(found)
    assert texts(config_of(bucket, tmp_path), "train") == of("train")


def test_a_file_of_another_size_is_fetched_again(bucket, tmp_path):
    book = tmp_path / "downloads" / "pg19" / "train" / "22.txt"
    book.parent.mkdir(parents=True)
    book.write_bytes(b"half a book")
    assert texts(config_of(bucket, tmp_path), "train") == of("train")


def test_a_server_without_ranges_sends_everything_again(bucket, tmp_path):
    bucket.ranges = False
    bucket.cut["train/1.txt"] = 2
    assert texts(config_of(bucket, tmp_path), "train") == of("train")
    size = len(BOOKS["train/1.txt"])
    asked = [(None, size // 2), (f"bytes={size // 2}-", size // 2), (f"bytes={size // 2}-", size)]
    assert asked_for(bucket, "train/1.txt") == asked


def test_a_busy_server_is_asked_again(bucket, tmp_path):
    bucket.status["train/1.txt"] = [503, 429, 500]
    assert texts(config_of(bucket, tmp_path), "train") == of("train")


def test_a_part_that_the_server_refuses_to_continue_is_thrown_away(bucket, tmp_path):
    bucket.cut["train/1.txt"] = 1
    bucket.status["train/1.txt"] = []
    original = Handler._object

    def refusing(self, name):
        if name == "train/1.txt" and self.headers.get("Range"):
            self.server.requests.append((name, self.headers["Range"], 0))
            self.send_error(416)
        else:
            original(self, name)

    Handler._object = refusing
    try:
        assert texts(config_of(bucket, tmp_path), "train") == of("train")
    finally:
        Handler._object = original
    assert [bool(asked) for asked, _ in asked_for(bucket, "train/1.txt")] == [False, True, False]


def test_a_missing_book_is_not_asked_for_again(bucket, tmp_path):
    bucket.status["train/1.txt"] = [404] * 10
    with pytest.raises(DataError, match=r"download failed \(HTTP Error 404"):
        load(config_of(bucket, tmp_path))
    assert len(asked_for(bucket, "train/1.txt")) == 1


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setattr(pg19, "BACKOFF_SECONDS", 0.001)
    config = TextData(source="pg19", pg19_url="http://127.0.0.1:9", data_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"download failed .*Check the network and pg19_url"):
        load(config)


@pytest.mark.parametrize(
    "listing",
    [
        b"<html>welcome</html>",
        b"[]",
        b'{"items": [{"name": "train/1.txt", "size": "5"}]}',
        b'{"items": [{"name": "train/1.txt", "size": "5", "md5Hash": "?"}]}',
        b'{"items": 3}',
    ],
)
def test_a_server_that_is_no_bucket(bucket, tmp_path, listing):
    bucket.listing = listing
    with pytest.raises(DataError, match=r"the answer is no listing of a bucket .*check pg19_url"):
        load(config_of(bucket, tmp_path))


def test_a_bucket_without_books(bucket, tmp_path):
    bucket.listing = b"{}"
    with pytest.raises(DataError, match="lists no books under train/"):
        load(config_of(bucket, tmp_path))


def test_a_listing_cannot_name_files_elsewhere(bucket, tmp_path):
    md5 = base64.b64encode(hashlib.md5(b"x").digest()).decode()
    items = [{"name": name, "size": "1", "md5Hash": md5} for name in ("train/../../x.txt", "/etc/x.txt", "train/7.csv")]
    bucket.listing = json.dumps({"items": items}).encode()
    assert pg19.listing(bucket.url, "train") == []


def test_a_full_disk_while_downloading(bucket, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pg19, "_append", full)
    with pytest.raises(DataError, match=r"No space left on device. Free space"):
        load(config_of(bucket, tmp_path))
