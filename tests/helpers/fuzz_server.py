"""A process that imports a command once and forks for every call of it.

python fuzz_server.py MODULE reads calls from stdin, a JSON list [argv, largest file in bytes or null, number of the
file operation at which to die or null] per line, and writes a JSON list [exit code, stderr, file operations] per line
to stdout. A call that takes longer than LIMIT seconds has exit code -9, one that dies as asked 99.
"""

import importlib
import json
import os
import resource
import signal
import sys
import warnings

LIMIT = 60
OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "ctypes.dlsym"}


class Operations:
    """Counts what changes files, as an audit hook that runs before each, and dies at number ``last``."""

    def __init__(self, last):
        self.last, self.count = last, 0

    def __call__(self, event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in OPERATIONS or writes:
            self.count += 1
            if self.count == self.last:
                os._exit(99)


def child(command, argv, largest, die, out, counted):
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    if largest is not None:  # what a full disk does to a writer
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    operations = Operations(die)
    sys.addaudithook(operations)
    from flowmaps.cli.run import run

    code = 70
    try:
        sys.argv = argv
        run(command)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(counted, str(operations.count).encode())
        os._exit(code)


def call(command, argv, largest, die):
    out, into = os.pipe()  # a limit on the size of files does not hold for it
    counts, counted = os.pipe()
    pid = os.fork()
    if not pid:
        os.setsid()
        os.close(out)
        child(command, argv, largest, die, into, counted)
    os.close(into)
    os.close(counted)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(pid, signal.SIGKILL))
    signal.alarm(LIMIT)
    with open(out, "rb") as read:  # noqa: PTH123
        stderr = read.read().decode(errors="replace")
    status = os.waitpid(pid, 0)[1]
    signal.alarm(0)
    with open(counts, "rb") as read:  # noqa: PTH123
        operations = int(read.read() or 0)
    return os.waitstatus_to_exitcode(status), stderr, operations


def main():
    warnings.simplefilter("ignore")
    command = importlib.import_module(sys.argv[1])
    for name in ("torch", "diffusers", "flowmaps.generate", "flowmaps.evaluation.evaluate", "flowmaps.importers"):
        importlib.import_module(name)
    if sys.argv[1].startswith("training"):
        importlib.import_module("training.loop")
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(call(command, *json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
