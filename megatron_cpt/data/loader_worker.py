"""One worker of a `Loader`: `python -m megatron_cpt.data.loader_worker`, started without torch.

Standard input brings the plan and then lists of sample numbers, standard output takes a batch, or the
error of our family that came instead of it, for each list. It ends when its parent does, or is gone.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection

from megatron_cpt.data.batches import batch
from megatron_cpt.errors import CptError


def main() -> int:
    """Answer until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole job; its parent decides
    requests = Connection(os.dup(0), writable=False)
    answers = Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # what a library prints must not stand between the answers
    try:
        plan = pickle.loads(requests.recv_bytes())
        while True:
            numbers = requests.recv()
            try:
                answer: object = batch([plan.sample(number) for number in numbers])
            except CptError as caught:
                answer = caught
            answers.send_bytes(pickle.dumps(answer, protocol=5))
    except CptError as caught:  # the plan could not be opened
        answers.send_bytes(pickle.dumps(caught))
    except (EOFError, ConnectionError):  # the parent is gone
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
