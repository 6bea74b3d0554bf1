"""Forecasts of part b, each in a separate process next to the GPU's work: ``python -m gpu.forecasts NAME SIZE``."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

AT_A_TIME = 4  # processes, of one core each


def started(sizes: dict[str, int]) -> dict[str, Future[dict[str, Any]]]:
    """Begin the forecasts of rows at their micro-batches, on the CPU."""
    pool = ThreadPoolExecutor(AT_A_TIME)
    return {name: pool.submit(_in_a_process, name, size) for name, size in sizes.items()}


def _in_a_process(name: str, size: int) -> dict[str, Any]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gpu.forecasts", name, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"forecast_error": done.stderr.strip().rpartition("\n")[2][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(name: str, size: str) -> None:
    from gpu.rows import load  # which imports this module
    from training.forecast.forecast import forecast

    made = forecast(replace(load(name, smoke=False), batch=int(size), accumulate=1))
    tflop = {precision: flops / 1e12 for precision, flops in made.flops.items()}
    print(json.dumps({"forecast_GiB": made.peak / 2**30, "forecast_micro_batch": int(size), "TFLOP": tflop}))


if __name__ == "__main__":
    main(*sys.argv[1:])
