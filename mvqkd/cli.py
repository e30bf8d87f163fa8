"""How every entry script reads its settings and reports what goes wrong.

    @dataclass
    class Settings:
        out_dir: Path
        seed: int = 1

    def main(settings: Settings) -> None: ...

    if __name__ == "__main__":
        cli.run(main, Settings)

``--config FILE`` may be given several times: later files, and then the other
options, win. A nested field is ``--a.b value``; an unknown key is an error. A list of paths with
``field(metadata={"positional": True})`` is what follows the options, at least one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from mvqkd.errors import RecipeError, reason_of

T = TypeVar("T")


def parse(
    settings_class: type[T], args: Sequence[str] | None = None, script: str | None = None
) -> tuple[T, bool]:
    """Read ``args`` (default: the command line) into ``settings_class``.

    Returns the settings and whether ``--debug`` was given. ``script`` is whose options they are,
    by default of the one that runs.

    Raises:
      RecipeError: an unknown or missing key, or a value of the wrong type.
    """
    parser = ArgumentParser(
        exit_on_error=False, allow_abbrev=False, description=settings_class.__doc__
    )
    parser.add_argument("--config", action="config", help="a YAML file; may be given again")
    parser.add_argument(
        "--debug", action="store_true", help="show tracebacks, as does MVQKD_DEBUG=1"
    )
    positional = {f.name for f in dataclasses.fields(settings_class) if "positional" in f.metadata}
    parser.add_class_arguments(settings_class, fail_untyped=True, skip=positional)
    for name in positional:
        parser.add_argument(name, type=Path, nargs="+")
    try:
        namespace = parser.parse_args(args)
    except ArgumentError as error:
        where = _conf_file_at_fault(parser, sys.argv[1:] if args is None else args, str(error))
        remedy = f"{script or sys.argv[0]} --help lists the options"
        raise RecipeError(f"{where}{_one_line(str(error))}; {remedy}") from error
    debug = namespace.pop("debug")
    namespace.pop("config")
    values = parser.instantiate(namespace)
    return settings_class(**values.as_dict()), debug


def _conf_file_at_fault(parser: ArgumentParser, args: Sequence[str], message: str) -> str:
    """``"FILE: "`` if a conf file alone gives this message, else nothing."""
    for option, path in itertools.pairwise(args):
        if option == "--config":
            try:
                parser.parse_args([option, path])
            except ArgumentError as error:
                if str(error) == message:
                    return f"{path}: "
            except RecipeError:
                pass  # a value that does not suit its neighbours says so itself
    return ""


def _one_line(message: str) -> str:
    return "; ".join(line.strip(" -") for line in message.splitlines() if line.strip())


def _end_cleanly_on_sigterm() -> None:
    """As Ctrl-C does: what is half-written is removed, and worker processes end too."""
    main_process = os.getpid()

    def end(*_) -> None:
        if os.getpid() != main_process:
            os._exit(143)  # a forked worker has nothing to tidy, and may wait for its parent
        sys.exit(143)

    signal.signal(signal.SIGTERM, end)


def run(main: Callable[[T], None], settings_class: type[T]) -> None:
    """Parse the command line, call ``main`` and exit: 0, or 1 after one line on stderr.

    With ``--debug``, or MVQKD_DEBUG=1 in the environment, an error shows its traceback. Under
    `mvqkd.launch` that prints the line: several processes may come to the same error.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    # Before the options are read, which may be what is wrong. The variable reaches all of run.sh.
    debug = "--debug" in sys.argv or os.environ.get("MVQKD_DEBUG") == "1"
    _end_cleanly_on_sigterm()
    try:
        settings, _ = parse(settings_class)
        main(settings)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, RecipeError):
            message = f"{sys.argv[0]}: {error}"
        else:
            remedy = "run again with --debug to see where"
            message = f"{sys.argv[0]}: {reason_of(error)}; {remedy}"
        if "MVQKD_LAUNCH" in os.environ:
            error_file = os.environ["TORCHELASTIC_ERROR_FILE"]
            record = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
            with open(error_file, "w") as file:
                json.dump({"message": record}, file)
        else:
            print(message, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # All is tidy. An exception in what Python does at exit would only be printed at length.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
