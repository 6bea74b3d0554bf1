"""Check the package on one CUDA GPU, and measure it there: what `make gpu` runs.

python scripts/gpu_check.py --parts=ab --out=runs/gpu
python scripts/gpu_check.py --parts=cd --out=runs/gpu --data=data
python scripts/gpu_check.py --device=cpu --smoke --out=runs/gpu-smoke

Part a runs the tests marked gpu; b takes steps of the rows of configs/ at their full size; c measures speed; d trains
configs/fashion_mnist.py:lagrangian and scores it. The results go to OUT/gpu.json after each one; a second call with the
same --out does what is left or failed. Exit codes: 0 nothing failed or no GPU, 1 something failed, 2 wrong arguments or
a missing package.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def arguments() -> argparse.Namespace:
    """Parse the command line without any package: the look for a GPU comes first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="abcd", help="Parts to run, in this order")
    parser.add_argument("--out", default="runs/gpu", help="Directory for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="Time for all parts, which share it")
    parser.add_argument("--data", default="data", help="Folder with the files of Fashion-MNIST, for part d")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only with --smoke")
    parser.add_argument("--smoke", action="store_true", help="Shrink everything to prove that the code runs")
    return parser.parse_args()


def has_gpu() -> bool:
    try:
        import torch
    except ModuleNotFoundError:
        return shutil.which("nvidia-smi") is not None
    return bool(torch.cuda.is_available())


def main() -> int:
    args = arguments()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported, here and in the processes of the parts
    mistake = ""
    if not args.parts or set(args.parts) - set("abcd") or len(set(args.parts)) < len(args.parts):
        mistake = f"--parts={args.parts}: choose from a, b, c and d, each once"
    elif not 0 < args.minutes <= 10_000:
        mistake = f"--minutes={args.minutes:g}: must be positive, and at most 10,000"
    elif args.device == "cpu" and not args.smoke:
        mistake = "--device=cpu: add --smoke, the networks of a GPU take hours on a CPU"
    elif args.device == "cuda" and not has_gpu():
        print("No CUDA GPU here, nothing to check; --device=cpu --smoke runs the code at a small size on the CPU")
        return 0
    if mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    try:
        from gpu.runner import Call, run
    except ModuleNotFoundError as error:
        print(f"error: {sys.executable} has no {error.name}: install it or add it to PYTHONPATH", file=sys.stderr)
        return 2
    out, data = (Path(os.path.expanduser(path)).resolve() for path in (args.out, args.data))  # noqa: PTH111
    try:
        return run(Call(args.parts, out, 60 * args.minutes, data, args.smoke))
    except OSError as error:
        print(f"error: {error.filename or out}: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
