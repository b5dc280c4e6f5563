"""Run a script, record each batch that its loaders give, and kill the process before a step.

python recorded_loop.py RECORD STEP SCRIPT ARGUMENTS…

A line of RECORD.RANK has the step, and a hash of the pixels and labels of the batch. STEP −1 is for no kill.
"""

import hashlib
import os
import runpy
import signal
import sys

import torch

from pipeline import Batch, Loader


def main() -> None:
    record, killed_at = sys.argv[1], int(sys.argv[2])
    sys.argv = sys.argv[3:]
    torch.set_num_threads(1)
    take = Loader.take

    def recorded(loader: Loader, step: int) -> Batch:
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = take(loader, step)
        content = b"".join(tensor.cpu().contiguous().numpy().tobytes() for tensor in batch)
        with open(f"{record}.{os.environ.get('RANK', '0')}", "a") as file:
            print(step, hashlib.blake2b(content, digest_size=16).hexdigest(), file=file)
        return batch

    Loader.take = recorded  # type: ignore[method-assign]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
