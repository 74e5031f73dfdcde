"""Forks a process for each case: `python -m galore_mem.verify.server`, a request a line on stdin.

A request names the files that are the case's stdin, stdout and stderr, and its time. The answers are two lines: the
process's number as it begins, its exit code when it has ended.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from galore_mem.verify.parent import end_with_parent

# what cases import, and how long it takes a case without this (seconds): torch 2.5, its compiler, which every optimizer
# asks for, 2.5, transformers 1, peft 2, bitsandbytes 1
WARM = ("torch", "torch._dynamo", "torch.profiler", "transformers", "bitsandbytes", "peft", "galore_mem.verify.worker")


def main() -> None:
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may speak there
    for module in WARM:
        with suppress(Exception):  # a case that needs it says what is wrong with it
            import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            case(request)
        print(json.dumps({"pid": pid}), file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


def case(request: dict[str, Any]) -> NoReturn:
    """The forked process: the worker, on the request's files."""
    code = 1
    try:
        os.setsid()  # it ends together with what it starts
        end_with_parent()
        for descriptor, (name, flags) in enumerate(
            (("in", os.O_RDONLY), ("out", os.O_WRONLY | os.O_CREAT), ("err", os.O_WRONLY | os.O_CREAT))
        ):
            os.dup2(os.open(request[name], flags, 0o600), descriptor)
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w", buffering=1)
        from galore_mem.verify.worker import main as work

        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:  # whatever a case ends with is its answer
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
