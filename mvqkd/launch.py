"""torchrun whose failures are one line: ``python3 -m mvqkd.launch OPTIONS SCRIPT ARGS...``.

Takes torchrun's options and its environment variables (``PET_NNODES``, ``PET_NODE_RANK``,
``PET_MASTER_ADDR`` and so on). The scripts, which end through `mvqkd.cli.run`, leave the
message of a `RecipeError` where torchrun looks for it.
"""

from __future__ import annotations

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun

from mvqkd.processes import PEER_LOST


def _message(failure: ProcessFailure) -> str:
    if isinstance(failure.message, dict):
        return failure.message["message"]
    return f"process {failure.local_rank} of this host: exit status {failure.exitcode}"


def main(args: list[str] | None = None) -> int:
    """The exit status: 0, or that of the first process that failed."""
    # As torchrun would set it, which says so at length.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["MVQKD_LAUNCH"] = "1"  # read by mvqkd.cli
    # How each of the processes was ended; the message of the first to fail says why.
    logging.disable(logging.ERROR)
    try:
        torchrun(args)
    except ChildFailedError as error:
        # In the order of their ends; those that ended because of another come last.
        failures = sorted(error.failures.values(), key=lambda f: f.timestamp)
        failures.sort(key=lambda f: PEER_LOST in _message(f))
        print(_message(failures[0]), file=sys.stderr)
        return max(1, failures[0].exitcode)
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
