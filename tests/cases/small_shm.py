"""Loader workers on a small /dev/shm: started by small_shm.sh."""

import os
import signal
import sys
import time

import torch

sys.path.insert(0, os.environ.get("CLONE", "."))
from flowmaps.data import ArrayData, Loader, ShuffledOrder

if __name__ == "__main__":
    size, batch, workers = (int(v) for v in sys.argv[1:])
    data = ArrayData(torch.zeros(512, 3, size, size, dtype=torch.uint8))
    order = ShuffledOrder(512, 0)
    loader = Loader(data, lambda k: order.indices(batch * k, batch), workers)

    def late(*_):
        print("FAILS no rows and no error in 60 s")
        os._exit(9)

    signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        with loader.watched():
            for k in range(8):
                loader.batch(k)
                time.sleep(1)
        print("HOLDS 8 batches")
    except Exception as error:
        print("HOLDS", type(error).__name__, str(error)[:150])
