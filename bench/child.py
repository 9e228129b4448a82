"""A process of its own that answers one request after the other, with a time limit: `Child`.

For work that may not share a process (XLA keeps one GPU's description), may end it (a compiler that aborts) or may
hang.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence


class ChildEnded(RuntimeError):
    """The process gave no answer: it ended, or was ended at the time limit. The message says which, in one line."""


class Child:
    """A running program that reads a request from each line of its input and answers with one line, both JSON.

    `answer_requests` is the loop on its side. Use it as a context: at the end the process is killed, with all processes
    that it started. If this process dies, the child finds the end of its input and leaves by itself.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 it is open as long as the process runs
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env=dict(environment),
            # A group of its own, to be killed as a whole.
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def ask(self, request, time_limit: float):
        """The answer to a request; `ChildEnded` if there is none within `time_limit` seconds."""
        process = self._process
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise ChildEnded(self._how_it_ended()) from None
        # One request has one answer, so nothing is waiting in the buffer that select does not see.
        ready, _, _ = select.select([process.stdout], [], [], time_limit)
        if not ready:
            self.close()
            raise ChildEnded(f"stopped at the time limit of {time_limit:g} s")
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            raise ChildEnded(self._how_it_ended())
        return json.loads(line)

    def close(self) -> None:
        """Kill the process and all it started."""
        with contextlib.suppress(ProcessLookupError):  # nothing of the group is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if not self._messages.closed:
            self._messages.close()

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        self._messages.seek(0)
        said = _telling_line(self._messages.read().decode(errors="replace"))
        self.close()
        how = f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
        return f"the process {how}{': ' if said else ''}{said}"


def _telling_line(messages: str) -> str:
    """The line of a process's last messages that says most: a compiler's error, else the last one."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    errors = [line for line in lines if "LLVM ERROR" in line or "Check failed" in line or line.startswith("F0")]
    return next(iter([*errors, *lines[::-1]]), "")[:300]


def answer_requests(answer: Callable) -> None:
    """Answer every line of standard input with `answer(request)`, until its end.

    What else is printed while working goes to the error output.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
