"""Runs a script in a fork of a process that has everything imported, which takes a fifth of the time of a new start.

python -S scripts/chaos_life.py SOCKET SCRIPT ARGUMENT...

This is the command that ckpt-chaos runs and kills (see chaos.py); the socket is that of `tests.helpers.forkserver`.
ckpt-chaos arms a new interpreter by its `sitecustomize`. A fork starts none, so it is armed here, in the same way.
"""

from __future__ import annotations

import json
import os
import socket
import sys

LIFE = """
import os, runpy, signal, sys, threading
from ckpt_chaos.targets.common import arm_from_env

def end_with_the_command():
    os.read(0, 1)  # returns when the command has ended
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=end_with_the_command, daemon=True).start()
arm_from_env(int(os.environ.get("RANK", "0")), lazy=True)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> int:
    """Returns the exit code of the life, as a shell would."""
    server, script, *arguments = sys.argv[1:]
    request = {
        "code": LIFE,
        "script": None,
        "arguments": [script, *arguments],
        "cwd": os.getcwd(),
        "env": dict(os.environ),
        "warnings": "default",
    }
    stdin, held = os.pipe()  # the other end is held by nobody but this process, until it ends
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        data = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [data], [stdin, 1, 2])
        connection.sendall(data[sent:])
        os.close(stdin)
        with connection.makefile() as answers:
            _, code = answers.readline(), int(answers.readline())
    os.close(held)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
