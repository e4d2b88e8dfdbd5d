"""torchrun without its traceback: the processes have said what was wrong.

python -m transformers_dylora.launch --nproc_per_node 2 run_glue.py ...
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main(argv: list[str] | None = None) -> int:
    """Start the processes; returns the exit code of the first that failed, 0 if none did."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(["--standalone", *(sys.argv[1:] if argv is None else argv)])
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(
            f"process {rank} was ended by {name}; if memory ran out, use a smaller batch per device.", file=sys.stderr
        )
        return 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
