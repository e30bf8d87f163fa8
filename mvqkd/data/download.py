"""Downloads that resume, are verified and never hang; archives whose paths are not trusted.

    download("https://host/corpus.tar.gz", "data/download/corpus.tar.gz", sha256="...")
    extract_files("data/download/corpus.tar.gz", "data/download/corpus", r"\\d+_\\w+\\.wav")

Only the standard library is used for both. `lhotse_download` is for what lhotse knows to fetch.
"""

import contextlib
import hashlib
import http.client
import re
import shutil
import socket
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from mvqkd.errors import RecipeError, reason_of
from mvqkd.files import locked, written_aside

BLOCK_BYTES = 1 << 18
# Answers that another attempt may change; every other 4xx is final.
RETRIED_CLIENT_ERRORS = (408, 425, 429)


class _BrokenError(Exception):
    """An attempt that failed in a way that another attempt may mend."""


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def download(
    url: str,
    path: str | Path,
    sha256: str | None = None,
    progress: bool = True,
    *,
    attempts: int = 5,
    timeout: float = 30.0,
    pause: float = 1.0,
    remedy: str = "check the network and run again",
    authorization: str | None = None,
) -> Path:
    """Fetch ``url`` to ``path``; a file that exists there is whole.

    The bytes gather in ``path + ".part"``, from which a later call goes on (HTTP ``Range``); where
    the server does not take ranges, or the file has changed there (``If-Range``), it starts over.
    A ``path`` that is there already is kept if its checksum is right or none is given. Several
    processes may ask for one at once.

    Args:
        sha256: expected checksum, 64 hexadecimal digits; None leaves only the length checked.
        progress: say on stderr, every few seconds, how far it is.
        attempts: how often to try in a row without getting any further.
        timeout: seconds without a byte after which an attempt counts as failed.
        pause: seconds before the second attempt, doubled before each later one.
        remedy: what the user is told to do when all attempts have failed.
        authorization: the header of that name, for the host of ``url`` alone: where a redirect
            leads elsewhere it is not sent.

    Raises:
        RecipeError: unreachable, refused, cut off each time, wrong checksum, or not writable.
    """
    path = Path(path)
    part, validator = (path.with_name(path.name + end) for end in (".part", ".part.etag"))

    def is_whole() -> bool:
        return path.is_file() and (sha256 is None or file_sha256(path) == sha256.lower())

    try:
        if is_whole():
            return path
        # Of several processes one fetches it, and the others find it whole.
        with locked(path.with_name(path.name + ".lock"), stays=False):
            if is_whole():
                return path
            furthest = failures = 0
            while True:
                resumed = _size(part) > 0
                try:
                    _attempt(
                        url, part, validator, timeout, _Meter(path.name, progress), authorization
                    )
                    found = file_sha256(part)
                    if sha256 is None or found == sha256.lower():
                        break
                    # The first part of a resumed file may come from elsewhere: once, start over.
                    _forget(part, validator)
                    if not resumed:
                        raise RecipeError(
                            f"{url}: its SHA-256 is {found}, not {sha256}; check the URL and the "
                            f"expected checksum, or {remedy}"
                        )
                except _BrokenError as error:
                    # A new byte counts, not an attempt: a large file over a bad line arrives.
                    failures = 1 if _size(part) > furthest else failures + 1
                    furthest = max(furthest, _size(part))
                    if failures >= attempts:
                        raise RecipeError(
                            f"{url}: {error} ({attempts} attempts in a row); {remedy}"
                        ) from error
                    time.sleep(pause * 2 ** (failures - 1))
            part.replace(path)
            _forget(part, validator)
    except urllib.error.HTTPError as error:
        raise RecipeError(f"{url}: the server answers {error.code} {error.reason}; {remedy}") from (
            error
        )
    except ValueError as error:
        raise RecipeError(f"{url}: {error}; give a URL that begins with http or https") from error
    except OSError as error:
        raise RecipeError(
            f"{error.filename or path}: {error.strerror or error}; free space or choose a folder "
            "that can be written to, then run again"
        ) from error
    return path


@contextlib.contextmanager
def lhotse_download(what: str, archive: Callable[[], Path], remedy: str) -> Iterator[None]:
    """Around a call of one of lhotse's downloaders, which resume: what they raise, in one line.

    Args:
        what: is fetched.
        archive: names the file that is fetched or unpacked.
        remedy: what else the user can do than to run again.

    Raises:
        RecipeError: no connection, one that broke off or fell silent, or a full disk.
    """
    # lhotse sets no timeout: a server that falls silent would hold the stage for ever.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)
    try:
        yield
    # lhotse takes a connection that breaks off for the end of the file, and unpacks what there is.
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise RecipeError(
            f"{archive()}: cut short or damaged ({reason_of(error)}); run again to fetch the rest, "
            "and remove it if that does not help"
        ) from error
    except OSError as error:
        raise RecipeError(
            f"{what} cannot be downloaded ({reason_of(error)}); run again to resume, or {remedy}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def extract_files(archive: str | Path, folder: str | Path, pattern: str) -> Path:
    """Take the regular files of a tar whose base name matches ``pattern`` into one flat ``folder``.

    Only base names are used, so no path inside the archive (absolute, with ``..``, a link) can
    lead outside. ``folder`` is written aside and renamed: if it exists, it is whole.

    Args:
        pattern: regular expression that the whole base name has to match.

    Raises:
        RecipeError: not a tar, cut short, the same name twice, or no file that matches. The
            archive is then removed, so that the next run fetches it again.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        with written_aside(folder) as aside, tarfile.open(archive) as tar:
            aside.mkdir()
            for member in tar:
                name = member.name.replace("\\", "/").rsplit("/", 1)[-1]
                if not member.isfile() or not re.fullmatch(pattern, name):
                    continue
                with tar.extractfile(member) as source, open(aside / name, "xb") as target:
                    shutil.copyfileobj(source, target)
            if not any(aside.iterdir()):
                raise tarfile.ReadError(f"holds no file named like {pattern}")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        # A broken gzip stream is an OSError too, but without a number.
        if isinstance(error, OSError) and error.errno and not isinstance(error, FileExistsError):
            raise RecipeError(
                f"{error.filename or folder}: {error.strerror}; free space or choose another "
                "folder, then run again"
            ) from error
        archive.unlink(missing_ok=True)
        # tarfile lists one line per compression that it tried.
        cause = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(
            f"{archive}: cannot be unpacked ({cause}), so it has been removed; run again to fetch "
            "it anew"
        ) from error
    return folder


class _SameHostRedirects(urllib.request.HTTPRedirectHandler):
    """Takes the authorization along to where the host itself leads, and nowhere else."""

    def redirect_request(self, request, *args):
        redirected = super().redirect_request(request, *args)
        key = "Authorization"
        if redirected is not None and key in request.unredirected_hdrs:
            places = (urllib.parse.urlsplit(r.full_url) for r in (request, redirected))
            if len({(place.scheme, place.netloc) for place in places}) == 1:
                redirected.add_unredirected_header(key, request.unredirected_hdrs[key])
        return redirected


def _attempt(
    url: str,
    part: Path,
    validator: Path,
    timeout: float,
    meter: "_Meter",
    authorization: str | None,
) -> None:
    """One request: append to ``part`` what it lacks. Returns when the file is complete.

    Raises _BrokenError where another attempt may help, HTTPError where none will.
    """
    have = _size(part)
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    if request.type not in ("http", "https"):
        raise ValueError(f"unknown kind of URL {request.type!r}")
    if authorization is not None:
        request.add_unredirected_header("Authorization", authorization)
    if have:
        request.add_header("Range", f"bytes={have}-")
        if validator.is_file():
            request.add_header("If-Range", validator.read_text(encoding="latin-1"))
    opener = urllib.request.build_opener(_SameHostRedirects)
    response = _network(lambda: opener.open(request, timeout=timeout), part, validator)
    with response:
        if response.status == 206:
            match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if not match or int(match[1]) != have:
                _forget(part, validator)
                raise _BrokenError("the server sent another range than the one asked for")
        else:
            have = 0
            _forget(part, validator)
            # Weak validators say nothing about bytes, so If-Range does not take them.
            etag = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if etag and not etag.startswith("W/"):
                validator.write_text(etag, encoding="latin-1")
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab") as file:
            while block := _network(lambda: response.read1(BLOCK_BYTES), part, validator):
                file.write(block)
                have += len(block)
                meter.show(have, total)
    # http.client does not complain where a body ends before its Content-Length.
    if total is not None and have != total:
        raise _BrokenError(f"the connection was cut after {have} of {total} bytes")


def _network(call: Callable, part: Path, validator: Path):
    """Run ``call``; tell failures of the network, which are retried, from those of the disk."""
    try:
        return call()
    except urllib.error.HTTPError as error:
        if error.code == 416:
            # What is here is longer than the file there, or just as long with nothing to say so.
            _forget(part, validator)
            raise _BrokenError("the server refused to resume") from error
        if error.code >= 500 or error.code in RETRIED_CLIENT_ERRORS:
            raise _BrokenError(f"the server answers {error.code} {error.reason}") from error
        raise
    except urllib.error.URLError as error:
        raise _BrokenError(f"cannot be reached ({error.reason})") from error
    except TimeoutError as error:
        raise _BrokenError("the server fell silent") from error
    except (http.client.HTTPException, OSError) as error:
        raise _BrokenError(f"the connection broke ({error or type(error).__name__})") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _forget(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


class _Meter:
    """Progress lines on stderr, one every ``every`` seconds."""

    def __init__(self, name: str, shown: bool, every: float = 5.0):
        self.name, self.shown, self.every = name, shown, every
        self.next = time.monotonic() + every

    def show(self, done: int, total: int | None) -> None:
        if not self.shown or time.monotonic() < self.next:
            return
        self.next = time.monotonic() + self.every
        of = f" of {total / 1e6:.1f}" if total else ""
        print(f"{self.name}: {done / 1e6:.1f}{of} MB", file=sys.stderr)
