"""Speed and quality of the quantizer beside its peers, as one table.

::

    . ./path.sh
    python3 -m benchmarks.quantizer.run --threads 2 --out-dir exp/benchmarks/quantizer
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.quantizer import encode_rate, train_step
from benchmarks.quantizer.rows import Row, markdown_table
from mvqkd.device import describe_device
from mvqkd.files import written_aside

# A further benchmark is a module with a function that returns its rows, named here.
BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "encode-rate-cpu": lambda options: encode_rate.measure(
        "cpu", options.frames, options.repeats, options.seed
    ),
    "encode-rate-gpu": lambda options: encode_rate.measure(
        "cuda", 16 * options.frames, options.repeats, options.seed
    ),
    "train-step-cpu": lambda options: train_step.measure("cpu", options.repeats, options.seed),
    "train-step-gpu": lambda options: train_step.measure("cuda", options.repeats, options.seed),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--frames", type=int, default=8192, help="encoded at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out-dir", type=Path, help="for table.md and results.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    rows = []
    for name in options.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += BENCHMARKS[name](options)
    table = markdown_table(rows)
    print(table)
    if options.out_dir is None:
        return
    typed = sys.argv[1:] if arguments is None else arguments
    document = {
        "command": shlex.join(["python3", "-m", "benchmarks.quantizer.run", *typed]),
        "device": describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "torch": torch.__version__,
        "seed": options.seed,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    options.out_dir.mkdir(parents=True, exist_ok=True)
    for name, text in (("table.md", table), ("results.json", json.dumps(document, indent=1))):
        with written_aside(options.out_dir / name) as aside:
            aside.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
