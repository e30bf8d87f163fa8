"""Teachers by name, from a hub on this machine that cuts, lies and is silent."""

import contextlib
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from transformers import HubertForCTC

from mvqkd.errors import RecipeError
from mvqkd.teachers import hub, load_teacher
from mvqkd.teachers.ctc import SYMBOLS
from mvqkd.teachers.hubert import HubertTeacher
from tests.conftest import tiny_hubert
from tests.teachers.batches import waveforms

COMMIT, NEWER = "1234567890abcdef" * 2 + "01234567", "f" * 40
LARGE = (".safetensors", ".bin")


class Hub(ThreadingHTTPServer):
    """Serves one model, ``lab/teacher``, at two commits; the attributes say how badly."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.cut = None  # the name of a file whose answers break off half-way
        self.spoilt = None  # the name of a file that comes with another byte
        self.token = None  # without which it gives no file
        self.store = None  # the URL of another server, to which it leads who asks for large files
        self.renamed = False  # it leads who asks for files to the model's new name
        self.released = threading.Event()  # unless set, it accepts and says nothing
        self.released.set()
        self.seen = []
        self.authorizations = []

    def handle_error(self, request, client_address):
        pass  # a client that gave up waiting

    def sibling(self, name):
        data = self.files[name]
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found = {"rfilename": name, "size": len(data), "blobId": git}
        if name.endswith(LARGE):
            digest = hashlib.sha256(data).hexdigest()
            found["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
        return found


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, path = self.server, self.path.split("?")[0]
        server.released.wait()
        server.seen.append((path, self.headers.get("Range")))
        server.authorizations.append(self.headers.get("Authorization"))
        if path.startswith("/api/models/"):
            self.model(*path.removeprefix("/api/models/").partition("/revision/")[::2])
        else:
            self.gated_file(path)

    def gated_file(self, path):
        server, name = self.server, path.partition("/resolve/")[2].partition("/")[2]
        authorization = self.headers.get("Authorization")
        if server.token and authorization != f"Bearer {server.token}":
            self.error("GatedRepo", 403 if authorization else 401)
        elif server.renamed and path.startswith("/lab/teacher/"):
            self.error("", 307, path.replace("/teacher/", "/renamed/", 1))
        elif server.store and name.endswith(LARGE):
            self.error("", 302, f"{server.store}{path}")
        else:
            self.file(name)

    def error(self, code, status=404, location=None):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def model(self, name, revision):
        if name == "lab/gated":
            return self.error("GatedRepo", 403)
        if name != "lab/teacher":
            return self.error("RepoNotFound")
        if revision not in ("", "main", COMMIT, NEWER):
            return self.error("RevisionNotFound")
        siblings = [self.server.sibling(name) for name in self.server.files]
        sha = COMMIT if revision == COMMIT else NEWER
        body = json.dumps({"id": name, "sha": sha, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def file(self, name):
        server, data = self.server, self.server.files[name]
        if name == server.spoilt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(data) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        body = data[start:]
        self.wfile.write(body[: len(body) // 2] if name == server.cut else body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    HubertTeacher(tiny_hubert(), False, list(SYMBOLS)).save(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for unused in ("README.md", "tf_model.h5", "model.fp32.safetensors", "pytorch_model.bin"):
        files[unused] = b"not needed"
    return files


@contextlib.contextmanager
def served(files):
    """The server and its URL."""
    with Hub(dict(files)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    with served(files) as (server, url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("mvqkd.data.download.time.sleep", lambda seconds: None)
        yield server


def asked(server):
    paths = [path.rpartition("/")[2] for path, _ in server.seen]
    server.seen.clear()
    return paths


def test_pinned_revision(server, files):
    teacher = load_teacher("lab/teacher", COMMIT)
    assert teacher.name == "lab/teacher" and teacher.vocabulary == SYMBOLS
    expected = HubertTeacher(tiny_hubert(), False).eval()
    batch = waveforms(8000)
    torch.testing.assert_close(teacher.embed(*batch, 2)[0], expected.embed(*batch, 2)[0])
    resolved = {path for path, _ in server.seen if "/resolve/" in path}
    assert resolved == {f"/lab/teacher/resolve/{COMMIT}/{name}" for name in wanted(files)}
    asked(server)
    # What is there is taken without the network.
    assert load_teacher("lab/teacher", COMMIT).dim == 32 and asked(server) == []


def wanted(files):
    return {name for name in files if name in (*hub.SETTINGS, "model.safetensors")}


def test_newest_revision(server, files):
    folder = hub.fetch("lab/teacher")
    assert folder.name == NEWER and {path.name for path in folder.iterdir()} == wanted(files)
    assert asked(server)[0] == "teacher"
    assert hub.fetch("lab/teacher") == folder and asked(server) == ["teacher"]
    # The hub's own tools find it there.
    assert snapshot_download("lab/teacher", local_files_only=True) == str(folder)
    assert asked(server) == []


def test_weights_in_several_files(server, files):
    del server.files["model.safetensors"]
    parts = {"model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two"}
    index = {"weight_map": dict(zip("ab", parts))}
    server.files |= {**parts, "model.safetensors.index.json": json.dumps(index).encode()}
    folder = hub.fetch("lab/teacher", COMMIT)
    names = {path.name for path in folder.iterdir()}
    assert names > {*parts, "model.safetensors.index.json"} and "pytorch_model.bin" not in names
    asked(server)
    assert hub.fetch("lab/teacher", COMMIT) == folder and asked(server) == []
    (folder / "model-00002-of-00002.safetensors").unlink()
    hub.fetch("lab/teacher", COMMIT)
    assert asked(server) == [COMMIT, "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("lacking", ["config.json", "preprocessor_config.json", "vocab.json"])
def test_snapshot_of_another_tool_lacks_settings(server, lacking):
    folder = hub.fetch("lab/teacher", COMMIT)
    (folder / lacking).unlink()
    asked(server)
    teacher = load_teacher("lab/teacher", COMMIT)
    assert not teacher.do_normalize and teacher.vocabulary == SYMBOLS
    assert asked(server) == [COMMIT, lacking]
    assert hub.fetch("lab/teacher", COMMIT) == folder and asked(server) == []


def test_snapshot_with_a_damaged_config(server, files):
    (hub.fetch("lab/teacher", COMMIT) / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"config\.json: its git hash is .*; run again"):
        hub.fetch("lab/teacher", COMMIT)
    folder = hub.fetch("lab/teacher", COMMIT)
    assert (folder / "config.json").read_bytes() == files["config.json"]


def test_model_without_a_head_needs_no_vocabulary(server):
    config = json.loads(server.files["config.json"])
    server.files["config.json"] = json.dumps({**config, "architectures": ["HubertModel"]}).encode()
    del server.files["vocab.json"]
    folder = hub.fetch("lab/teacher", COMMIT)
    asked(server)
    assert hub.fetch("lab/teacher", COMMIT) == folder and asked(server) == []


def test_goes_on_where_it_was_cut(server):
    server.cut = "model.safetensors"
    size = len(server.files["model.safetensors"])
    server.files["model.safetensors"] += b"."  # never there by halves
    with pytest.raises(RecipeError, match="the connection was cut"):
        hub.fetch("lab/teacher", COMMIT)
    ranges = [wanted for path, wanted in server.seen if path.endswith("model.safetensors")]
    furthest = int(ranges[-1].removeprefix("bytes=").removesuffix("-"))
    assert furthest > size // 2
    asked(server)
    server.cut = None
    folder = hub.fetch("lab/teacher", COMMIT)
    (again,) = [wanted for path, wanted in server.seen if path.endswith("model.safetensors")]
    assert int(again.removeprefix("bytes=").removesuffix("-")) >= furthest
    assert (folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]


@pytest.mark.parametrize("name, cause", [("model.safetensors", "SHA-256"), ("vocab.json", "git")])
def test_file_that_is_not_what_the_hub_says(server, name, cause):
    server.spoilt = name
    with pytest.raises(RecipeError, match=rf"{name}: its {cause}") as caught:
        hub.fetch("lab/teacher", COMMIT)
    assert "\n" not in str(caught.value)
    server.spoilt = None
    folder = hub.fetch("lab/teacher", COMMIT)
    assert (folder / name).read_bytes() == server.files[name]


@pytest.mark.parametrize(
    "name, revision, cause",
    [
        ("lab/nothing", None, "no model of that name on the hub"),
        ("some/folder/of mine", None, "no such folder or file, and no model of that name"),
        ("lab/teacher", "0" * 40, f"the hub has no revision {'0' * 40} of it"),
    ],
)
def test_what_the_hub_does_not_have(server, name, revision, cause):
    with pytest.raises(RecipeError, match=f"^teacher {name}: .*{cause}") as caught:
        load_teacher(name, revision)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stored", [True, False])
def test_gated_model(server, files, tmp_path, monkeypatch, stored):
    server.token = "hf_secret"
    with pytest.raises(RecipeError) as caught:
        hub.fetch("lab/teacher", COMMIT)
    message = str(caught.value)
    assert message.startswith("teacher lab/teacher: the hub refuses to give config.json, as of a ")
    assert "set HF_TOKEN" in message and "give the folder" in message and "\n" not in message
    assert set(server.authorizations) == {None}
    server.authorizations.clear()
    if stored:  # as hf auth login leaves it
        (tmp_path / "token").write_text("hf_secret")
    else:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder = hub.fetch("lab/teacher", COMMIT)
    assert {path.name for path in folder.iterdir()} == wanted(files)
    assert set(server.authorizations) == {"Bearer hf_secret"}
    with pytest.raises(RecipeError, match=r"^teacher lab/gated: is gated on the hub; accept its"):
        hub.fetch("lab/gated", COMMIT)


def test_token_is_for_the_hub_alone(server, files, monkeypatch):
    """Which leads to another host for large files, and to itself for a model with a new name."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.token, server.renamed = "hf_secret", True
    with served(files) as (store, server.store):
        folder = hub.fetch("lab/teacher", COMMIT)
        assert {path.name for path in folder.iterdir()} == wanted(files)
        assert [path.rpartition("/")[2] for path, _ in store.seen] == ["model.safetensors"]
        assert store.authorizations == [None]
    assert set(server.authorizations) == {"Bearer hf_secret"}
    new = [path for path, _ in server.seen if path.startswith("/lab/renamed/")]
    assert len(new) == len(wanted(files))
    # Nor does it come back with who is led back.
    server.seen.clear()
    (folder / "model.safetensors").unlink()
    with served(files) as (store, server.store):
        store.store = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(RecipeError, match=r"refuses to give model\.safetensors"):
            hub.fetch("lab/teacher", COMMIT)
    assert server.authorizations[-1] is None


def test_files_by_name_wherever_they_lie(server, files):
    server.files |= {"data/train.jsonl.gz": b"cuts", "data/one.h5": b"1", "two.h5": b"22"}
    folder = hub.fetch_files("lab/teacher", COMMIT, ["one.h5", "train.jsonl.gz"])
    assert folder.name == COMMIT and asked(server) == [COMMIT, "one.h5", "train.jsonl.gz"]
    assert (folder / "data/one.h5").read_bytes() == b"1" and not (folder / "two.h5").exists()
    # What is there is taken without the network.
    assert hub.fetch_files("lab/teacher", COMMIT, ["one.h5"]) == folder and asked(server) == []
    with pytest.raises(RecipeError, match=r"labels lab/teacher: the hub has no 3\.h5 there, but"):
        hub.fetch_files("lab/teacher", COMMIT, ["3.h5"])
    with pytest.raises(RecipeError, match="labels lab/nothing: no such folder or file, and no"):
        hub.fetch_files("lab/nothing", None, ["3.h5"])


def test_no_weights(server):
    for name in [name for name in server.files if name.endswith(LARGE)]:
        del server.files[name]
    with pytest.raises(RecipeError, match="teacher lab/teacher: the hub's model has no"):
        hub.fetch("lab/teacher")


def test_hub_that_cannot_be_reached(server, monkeypatch):
    folder = hub.fetch("lab/teacher", COMMIT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        cause = "the hub http://127.0.0.1.* cannot be reached .* and give the folder"
        for revision in (None, NEWER):
            with pytest.raises(RecipeError, match=f"^teacher lab/teacher: .*{cause}") as caught:
                load_teacher("lab/teacher", revision)
            assert "\n" not in str(caught.value)
        assert hub.fetch("lab/teacher", COMMIT) == folder
        # A folder needs no hub.
        assert isinstance(load_teacher(folder).model, HubertForCTC)


def test_hub_that_is_silent(server, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.1)
    server.released.clear()
    with pytest.raises(RecipeError, match=r"teacher lab/teacher: .* cannot be reached .*Timeout"):
        load_teacher("lab/teacher", COMMIT)
    server.released.set()
