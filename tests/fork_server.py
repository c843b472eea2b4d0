"""The server behind `fresh.py`, which starts it: imports libraries once, and forks a process for each request.

    python fork_server.py LISTENING_SOCKET LIBRARY...

Processes that run tests share it; it ends with the last of them. A request is JSON, with four files: the process's
standard input, output and error, and one to which its process id and, at its end, its exit status are written, as C
ints. A forked process leaves `serve` and ends as any interpreter does.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import struct
import sys


def serve(listener: socket.socket) -> dict:
    """Forks until the last client has closed its connection. Returns the request, in a forked process only."""
    clients: list[socket.socket] = [listener.accept()[0]]
    # Whose process it is, and where its end is reported.
    running: dict[int, tuple[socket.socket, int]] = {}
    while clients or select.select([listener], [], [], 0)[0]:
        for ready in select.select([listener, *clients], [], [], 0.01 if running else None)[0]:
            if ready is listener:
                clients.append(listener.accept()[0])
                continue
            message, files, *_ = socket.recv_fds(ready, 2**20, 4)
            if not message:
                for child, (client, _) in running.items():
                    if client is ready:
                        os.kill(child, signal.SIGKILL)
                clients.remove(ready)
                ready.close()
                continue
            *streams, report = files
            child = os.fork()
            if child == 0:
                for number, file in enumerate(streams):
                    os.dup2(file, number)
                for file in (*files, *(file for _, file in running.values())):
                    os.close(file)
                for each in (listener, *clients):
                    each.close()
                return json.loads(message)
            running[child] = ready, report
            tell(report, child)
            for file in streams:
                os.close(file)
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                _, report = running.pop(child)
                tell(report, os.waitstatus_to_exitcode(status))
                os.close(report)
    os._exit(0)


def tell(report: int, number: int) -> None:
    # Nobody reads it if the client has ended.
    with contextlib.suppress(BrokenPipeError):
        os.write(report, struct.pack("i", number))


ended: dict[str, int] = {}


@atexit.register
def skip_teardown() -> None:
    """Registered first and called last: freeing all objects would copy the memory that is shared with the server."""
    if "status" in ended:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(ended["status"])


def become(request: dict) -> None:
    """Becomes the requested process."""
    # A shell without job control starts what runs in the background with SIGINT ignored, which is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["new_session"]:
        os.setsid()
    if request["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
    # Anew, since the server's remember what kind of files they were opened on.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        mode, buffering = "r" if name == "stdin" else "w", 1 if name == "stderr" else -1
        stream = getattr(sys, name)
        if name in request["closed"]:
            os.close(number)
            stream = None
        else:
            stream = open(number, mode, buffering, stream.encoding, stream.errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:0] = request["path"]
    # What they read from the server's environment.
    for name in ("transformers.utils", "transformers.utils.hub", "transformers.dynamic_module_utils"):
        sys.modules[name].HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
    if "HF_DATASETS_CACHE" in os.environ:
        importlib.reload(sys.modules["datasets.config"])
    try:
        run(*request["words"])
        ended["status"] = 0
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            ended["status"] = stop.code or 0
        raise


def run(kind: str, *words: str) -> None:
    if kind == "-c":
        sys.argv = ["-c", *words[1:]]
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = [*words]
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *words]
        sys.path.insert(0, os.path.dirname(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    # This file's own folder.
    sys.path.pop(0)
    listener = socket.socket(fileno=int(sys.argv[1]))
    # A collection in a forked process would copy the memory of all these objects; here it only takes time.
    gc.disable()
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    become(serve(listener))
