"""The commands for a shell script to run, without each of them importing MLX anew: forked off a process that has.

What a command does is the same, its arguments, output, exit code and folder too; only the second of imports is saved.
On macOS, where a forked process may not use Metal, each is a process of its own.
"""

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

COMMANDS = {
    "logitstore": "distill_cli.logitstore",
    "distill-train": "distill_cli.distill_train",
    "distill-eval": "distill_cli.distill_eval",
    "distill-merge": "distill_cli.distill_merge",
    "mlx_lm.generate": "mlx_lm.generate",
}
HEAVY = ("logitstore.build", "distill_trainer.train", "distill_trainer.distill_eval", "distill_trainer.merge_adapters")
ALONE = """#!{python}
from {module} import main
main()
"""
CLIENT = """#!{python} -S
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
message = json.dumps([{name!r}, sys.argv[1:], os.getcwd()]).encode()
socket.send_fds(server, [message], [0, 1, 2])
sys.exit(int(server.recv(16) or b"1"))
"""


@contextmanager
def warm_commands(folder: Path) -> Iterator[Path]:
    """Yield a folder for the PATH, in which the commands are."""
    address = str(folder / "socket")
    fork = sys.platform == "linux"
    for name, module in COMMANDS.items():
        source = CLIENT.format(python=sys.executable, address=address, name=name)
        (folder / name).write_text(source if fork else ALONE.format(python=sys.executable, module=module))
        (folder / name).chmod(0o755)
    if not fork:
        yield folder
        return
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    code = f"from tests.warm_commands import serve; serve({listener.fileno()})"
    server = subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=[listener.fileno()], cwd=Path(__file__).parent.parent
    )
    listener.close()
    try:
        yield folder
    finally:
        server.terminate()
        server.wait()


def serve(handle: int) -> None:
    """Answer one command after the other, each in a process of its own."""
    for module in (*HEAVY, *COMMANDS.values()):
        import_module(module)
    listener = socket.socket(fileno=handle)
    while True:
        client, _ = listener.accept()
        message, streams, _, _ = socket.recv_fds(client, 1 << 16, 3)
        child = os.fork()
        if child == 0:
            name, args, cwd = json.loads(message)
            for i, stream in enumerate(streams):
                os.dup2(stream, i)
            os.chdir(cwd)
            sys.argv = [name, *args]
            os._exit(_run(name))
        for stream in streams:
            os.close(stream)
        client.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
        client.close()


def _run(name: str) -> int:
    code = 1
    try:
        import_module(COMMANDS[name]).main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code
