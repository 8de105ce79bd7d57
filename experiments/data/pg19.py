"""PG-19, books before 1919, from its public bucket over plain HTTPS: resumable and checksummed."""

from __future__ import annotations

import base64
import concurrent.futures
import functools
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from experiments.data.cache import DISK_ERRORS, digest
from experiments.data.corpus import CORPUS_FORMAT, Source, Text
from experiments.data.protocol import DataError

BUCKET = "deepmind-gutenberg"
SPLITS = ("train", "validation", "test")
ATTEMPTS = 6
BACKOFF_SECONDS = 1.0  # before the second attempt; doubled before every further one
TIMEOUT_SECONDS = 60.0
CONNECTIONS = 8
CHUNK_BYTES = 1 << 18

T = TypeVar("T")


class Book(NamedTuple):
    """An object of the bucket: `train/123.txt`, its size in bytes and its MD5 as hexadecimal digits."""

    name: str
    size: int
    md5: str


def pg19(url: str, downloads: Path, books: int | None = None) -> Source:
    """The books, one document each; 28,602 for training (11 GB), 50 for validation, 100 for test.

    Args:
      url: the storage server, which answers both the listing of the JSON API and the objects.
      downloads: where the files are kept. What is there already is not fetched again.
      books: only so many training books, the first by name. None: all.
    """
    url = url.rstrip("/")

    def texts(split: str) -> Iterator[Text]:
        found = listing(url, split, books if split == "train" else None)
        if not found:
            raise DataError(f"{url}: the bucket {BUCKET} lists no books under {split}/; check pg19_url")
        fetch_all(url, found, downloads)
        for book in found:
            text = (downloads / book.name).read_bytes().decode("utf-8", errors="replace")
            yield Text(book.name, text)

    return Source(
        name="pg19" if books is None else f"pg19:{books}",
        folder="pg19",
        key=digest(CORPUS_FORMAT, "pg19", url, books),
        splits=SPLITS,
        texts=texts,
    )


def listing(url: str, split: str, limit: int | None = None) -> list[Book]:
    """The books of a split in order of their names, at most `limit`.

    Raises:
      DataError: the server cannot be reached or does not answer with a listing.
    """
    books: list[Book] = []
    query = {"prefix": f"{split}/", "fields": "nextPageToken,items(name,size,md5Hash)"}
    while True:
        address = f"{url}/storage/v1/b/{BUCKET}/o?{urllib.parse.urlencode(query)}"
        try:
            page = json.loads(_retry(address, functools.partial(_get, address)))
            for item in page.get("items", ()):
                if re.fullmatch(rf"{split}/[^/]+\.txt", item["name"]):
                    md5 = base64.b64decode(item["md5Hash"], validate=True).hex()
                    books.append(Book(item["name"], int(item["size"]), md5))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{address}: the answer is no listing of a bucket ({error!r}); check pg19_url") from error
        if "nextPageToken" not in page or (limit is not None and len(books) >= limit):
            return sorted(books)[:limit]
        query["pageToken"] = page["nextPageToken"]


def fetch_all(url: str, books: list[Book], downloads: Path) -> None:
    """Downloads what is missing. On an error everything that is complete stays, and so do the beginnings of
    the rest.

    Raises:
      DataError: a book could not be fetched in several attempts.
    """
    missing = [book for book in books if not _complete(downloads / book.name, book.size)]
    if not missing:
        return
    with (
        concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool,
        tqdm(
            desc="pg19: download", total=sum(b.size for b in missing), unit="B", unit_scale=True, disable=None
        ) as progress,
    ):
        jobs = {pool.submit(fetch, url, book, downloads / book.name): book for book in missing}
        try:
            for job in concurrent.futures.as_completed(jobs):
                job.result()
                progress.update(jobs[job].size)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def fetch(url: str, book: Book, target: Path) -> None:
    """Downloads one book: goes on where an earlier attempt stopped, and names it only when its MD5 is right.

    Raises:
      DataError: it failed several times, or the server has no such book.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    address = f"{url}/{BUCKET}/{urllib.parse.quote(book.name)}"
    _retry(address, lambda: _append(address, book, part))
    os.replace(part, target)


def _complete(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _append(address: str, book: Book, part: Path) -> None:
    """One attempt: asks for the bytes that `part` lacks and checks the whole."""
    have = part.stat().st_size if part.exists() else 0
    if have > book.size:
        part.unlink()
        have = 0
    if have < book.size:
        request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
            # A server without ranges sends everything again, with status 200.
            with answer, open(part, "ab" if answer.status == 206 else "wb") as file:
                while chunk := answer.read(CHUNK_BYTES):
                    file.write(chunk)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            part.unlink(missing_ok=True)
            raise ConnectionError("the server does not continue the file") from error
    got = part.stat().st_size
    if got < book.size:
        raise ConnectionError(f"the connection closed after {got} of {book.size} bytes")
    if hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest() != book.md5:
        part.unlink()
        raise ConnectionError("the checksum of what arrived is wrong")


def _get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
        return bytes(answer.read())


def _retry(address: str, attempt: Callable[[], T]) -> T:
    problem: Exception | None = None
    for number in range(ATTEMPTS):
        if number:
            time.sleep(BACKOFF_SECONDS * 2 ** (number - 1))
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            problem = error
            if error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            problem = error
    raise DataError(
        f"{address}: download failed ({problem}). Check the network and pg19_url, and run the same command "
        "again: it goes on where it stopped"
    ) from problem
