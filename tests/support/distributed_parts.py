"""The parts of ``test_distributed.py``: ``torchrun ... MODEL TWO FSDP PORT PORT PORT``.

Two processes import what they need once, and fork for every part: two whole models until one
process is killed (into ``TWO``), the same under FSDP (into ``FSDP``), and that gone on with. They
meet at another port in each, where an earlier part has left nothing. How process 0 ended in each
goes to ``FSDP/ended.json``.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import distributed_worker
import fsdp_worker

from fst_dspy import distributed


def run(work, model, folder, port):
    """Run a part in a process of its own: its exit status, below 0 that of a signal.

    Where one process has died the other is ended, as ``torchrun`` would: by a signal of its own, so
    that it does not look killed.
    """
    pid, died = os.fork(), folder / f"died-{port}"
    if not pid:
        try:
            os.environ["MASTER_PORT"] = port
            work(model, folder)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if died.exists():
            os.kill(pid, signal.SIGUSR1)
        time.sleep(0.02)
    code = os.waitstatus_to_exitcode(ended[1])
    if code:
        died.touch()
    return code


def main(model, two, fsdp, ports):
    parts = (
        (distributed_worker.main, two, True),
        (fsdp_worker.main, fsdp, True),
        (fsdp_worker.main, fsdp, False),
    )
    ended = []
    for (work, folder, is_killed), port in zip(parts, ports, strict=True):
        ended.append(run(work, model, folder, port))
        # The other process may find the connection to the killed one gone before it is ended.
        if ended[-1] > 0 and (distributed.is_main() or not is_killed):
            sys.exit(ended[-1])
    if distributed.is_main():
        (fsdp / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
