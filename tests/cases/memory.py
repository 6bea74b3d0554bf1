"""Memory that the writer of sample.py keeps for n images of 256 x 256: at most about 1 byte per value, streamed."""

import resource
import sys

import torch
from common import TMP, case

from flowmaps.evaluation.samples import write_samples

n, size = int(sys.argv[1]) if len(sys.argv) > 1 else 1000, 256
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_samples(((torch.zeros(50, 3, size, size), None) for _ in range(0, n, 50)), TMP, 1)
each = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024 / n / (3 * size * size)
case(f"{n} images: at most 4 bytes of memory per value", each <= 4, f"{each:.1f}")
