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
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from mvqkd.processes import PEER_LOST


def main(args: list[str] | None = None) -> int:
    """The exit status: 0, or that of the first process that failed."""
    # As torchrun would set it, which says so at length.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # How each of the processes was ended; the message of the first to fail says why.
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        torchrun(args)
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda f: PEER_LOST in f.message)
        print(failures[0].message, file=sys.stderr)
        return max(1, failures[0].exitcode)
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
