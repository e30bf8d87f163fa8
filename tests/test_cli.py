"""Settings from files and options; one line for what is wrong."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mvqkd import cli
from mvqkd.device import pick_device
from mvqkd.errors import RecipeError


@dataclass
class Inner:
    a: int = 1
    b: float = 2.0

    def __post_init__(self):
        if self.a > 100:
            raise RecipeError("inner.a: above 100; lower it")


@dataclass
class Settings:
    """A stage's settings."""

    out: Path
    inner: Inner = field(default_factory=Inner)
    names: list[str] = field(default_factory=list)


@pytest.fixture
def conf(tmp_path):
    def write(text):
        path = tmp_path / f"conf{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_later_settings_win(conf):
    args = ["--config", conf("inner: {a: 3, b: 1}\nnames: [x]"), "--config", conf("inner: {a: 4}")]
    settings, debug = cli.parse(Settings, [*args, "--out", "here", "--inner.b", "5"])
    assert settings == Settings(Path("here"), Inner(4, 5.0), ["x"])
    assert not debug
    assert cli.parse(Settings, ["--out", "here", "--debug"])[1]


@pytest.mark.parametrize(
    "text, cause",
    [
        ("inner: {aa: 3}", "'aa'"),
        ("iner: {a: 3}", "iner"),
        ("inner: {a: x}", 'Parser key "inner.a"'),
        ("inner: {a: [", "parsing"),
        ("", "Unexpected config"),
        ("[1, 2]", "Unexpected config"),
    ],
)
def test_bad_conf_file_is_named_in_one_line(conf, text, cause):
    good, bad = conf("inner: {a: 3}"), conf(text)
    with pytest.raises(RecipeError) as caught:
        cli.parse(Settings, ["--out", "o", "--config", good, "--config", bad])
    message = str(caught.value)
    assert message.startswith(f"{bad}: ") and cause in message and "\n" not in message


@pytest.mark.parametrize(
    "args, cause",
    [
        (["--out", "o", "--wrong", "3"], "--wrong"),
        (["--out", "o", "--inner.aa", "3"], "--inner.aa"),
        (["--out", "o", "--inner.a", "x"], "inner.a"),
        (["--out", "o", "--inner.a", "101"], "inner.a: above 100; lower it"),
        (["--out", "o", "--config", "no/such.yaml"], "no/such.yaml"),
        (["--inner.a", "3"], "out"),
    ],
)
def test_bad_option_is_named_in_one_line(args, cause):
    with pytest.raises(RecipeError) as caught:
        cli.parse(Settings, args)
    assert cause in str(caught.value) and "\n" not in str(caught.value)


def test_run_prints_one_line_and_exits_with_1(monkeypatch, capsys):
    def fail(settings):
        raise RecipeError("FILE: cause; remedy")

    monkeypatch.delenv("MVQKD_DEBUG", raising=False)
    monkeypatch.setattr("sys.argv", ["stage.py", "--out", "o"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(fail, Settings)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "stage.py: FILE: cause; remedy\n"
    monkeypatch.setattr("sys.argv", ["stage.py", "--out", "o", "--debug"])
    with pytest.raises(RecipeError):
        cli.run(fail, Settings)


@pytest.fixture
def unexpected(monkeypatch):
    """A main that ends in an error that nobody has foreseen, and its command line."""

    def fail(settings):
        raise KeyError("first\nsecond")

    monkeypatch.delenv("MVQKD_DEBUG", raising=False)
    monkeypatch.delenv("MVQKD_LAUNCH", raising=False)
    monkeypatch.setattr("sys.argv", ["stage.py", "--out", "o"])
    return fail


def test_unexpected_error_is_one_line_too(unexpected, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run(unexpected, Settings)
    assert stopped.value.code == 1
    line = "stage.py: KeyError: 'first\\nsecond'; run again with --debug to see where\n"
    assert capsys.readouterr().err == line

    def full(settings):
        raise RuntimeError("\nCUDA out of memory\nmuch more")

    with pytest.raises(SystemExit):
        cli.run(full, Settings)
    line = "stage.py: RuntimeError: CUDA out of memory; run again with --debug to see where\n"
    assert capsys.readouterr().err == line


def test_debug_lets_errors_through(unexpected, monkeypatch):
    monkeypatch.setenv("MVQKD_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.run(unexpected, Settings)
    monkeypatch.setenv("MVQKD_DEBUG", "")
    with pytest.raises(SystemExit):
        cli.run(unexpected, Settings)
    monkeypatch.setattr("sys.argv", ["stage.py", "--out", "o", "--debug"])
    with pytest.raises(KeyError):
        cli.run(unexpected, Settings)


def test_unexpected_error_is_left_for_the_launcher(unexpected, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MVQKD_LAUNCH", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as stopped:
        cli.run(unexpected, Settings)
    assert stopped.value.code == 1 and capsys.readouterr().err == ""
    record = json.loads((tmp_path / "error.json").read_text())["message"]
    assert record["message"].startswith("stage.py: KeyError: ")
    assert record["message"].endswith("; run again with --debug to see where")


def test_unknown_key_leaves_main_uncalled(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["stage.py", "--out", "o", "--wrong", "1"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda settings: pytest.fail("called"), Settings)
    assert stopped.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_pick_device(monkeypatch):
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(RecipeError, match="--device gpu: not known"):
        pick_device("gpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(RecipeError, match="no CUDA device"):
        pick_device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [pick_device(name).type for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert pick_device("auto").index == rank and pick_device("cpu").type == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RecipeError, match="process 2 of this host finds no device of its own"):
        pick_device("cuda")


@dataclass
class WithFiles:
    """Of a script that takes files."""

    files: list[Path] = field(metadata={"positional": True})
    inner: Inner = field(default_factory=Inner)


def test_paths_after_the_options(conf):
    settings, _ = cli.parse(WithFiles, ["--inner.a", "3", "a b.wav", "-", "c"])
    assert settings == WithFiles([Path("a b.wav"), Path("-"), Path("c")], Inner(3))
    with pytest.raises(RecipeError, match="files"):
        cli.parse(WithFiles, [])
    with pytest.raises(RecipeError, match="inner"):
        cli.parse(WithFiles, ["--config", conf("inner: {z: 4}"), "a"])
