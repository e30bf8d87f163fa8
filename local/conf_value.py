"""Print what conf files say of a key: the last that names it wins.

Nothing where none does, or where one cannot be read: the step that they are for says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("key")
    parser.add_argument("--config", action="append", type=Path, required=True)
    args = parser.parse_args()
    value = None
    for path in args.config:
        try:
            conf = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return
        if isinstance(conf, dict):
            value = conf.get(args.key, value)
    if value is not None:
        print(value)


if __name__ == "__main__":
    main()
