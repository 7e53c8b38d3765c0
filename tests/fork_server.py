"""Python processes that start with torch imported: they are forked from a server, not executed anew.

Importing torch and DeepSpeed takes every rank seconds, and the tests start hundreds of them. `ForkServer(modules)`
starts one process that imports the modules once. `ForkServer.popen(...)` is `subprocess.Popen(...)` for commands of the
form `[sys.executable, "script.py", ...]`; the server forks, and the child becomes that command: its arguments,
environment, working directory, session, signals and standard streams are those of a new process, and it imports this
repository's modules anew, but for `OWN`, which every run needs. `python -m launch.ranks` forks its ranks in the same
way, so that its own code starts, watches and ends them, and so do `python -m tools.benchmark` with its launches and
DeepSpeed's launcher.

A command is executed as usual if it is not a Python script, or if it sets an environment variable that libraries may
read when they are imported (any but those of `FORKED`).

Differences from a new process: stdout is never buffered, ranks share one seed of `hash(str)`, /proc/PID/cmdline is the
server's, and warnings that C++ code logs are off, as in ranks that a launcher starts.
"""

import atexit
import ctypes
import gc
import importlib
import inspect
import io
import json
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import weakref
from pathlib import Path
from typing import Any, NoReturn

# Environment variables that may differ from the server's: they are read when a script runs, not by an import.
FORKED = re.compile(
    "RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|LOCAL_SIZE|FIRST_RANK|MASTER_ADDR|MASTER_PORT|CUDA_VISIBLE_DEVICES"
    "|PYTEST_CURRENT_TEST|MARK|WANDB_.*|TIKTOKEN_CACHE_DIR|LC_CTYPE|TORCH_CPP_LOG_LEVEL"
    "|GLOO_SOCKET_IFNAME|CROSS_RANK|CROSS_SIZE"
    "|TORCHINDUCTOR_CACHE_DIR|PYTORCH_NVML_BASED_CUDA_CHECK"  # the last two are set by imports
)
# Modules that start other processes, which are then forked, too.
FORKING = ("launch.ranks", "tools.accept", "tools.benchmark", "deepspeed.launcher.runner", "deepspeed.launcher.launch")
# Modules of this repository that keep nothing from the moment of their import, for commands in its root.
OWN = ["model", "data.dataset", "data.tokenizer"]
OWN += [f"training.{name}" for name in ("batches", "checkpoint", "config", "devices", "distributed", "errors")]
OWN += [f"training.{name}" for name in ("deepspeed_config", "figures", "fsdp", "init", "optim", "run_folder")]
OWN_MODULES: dict[str, types.ModuleType] = {}
ROOT = Path(__file__).parent.parent
ROOM = "ROOM"  # a variable of the server whose place in memory takes a child's environment, for /proc/PID/environ
ROOM_BYTES = 2**15
MESSAGE_BYTES = 2**17  # more than a command and its environment
SERVER_ENVIRONMENT: dict[str, str] = {}  # in the server and its children
SET_BY_IMPORTS: dict[str, str] = {}  # environment variables
KEPT: set[str] = set()  # modules that the server imported
PATH: list[str] = []  # sys.path without the folder of a script
ROOM_ADDRESS = [0]
LIBC = ctypes.CDLL(None)
EXECUTE_CHILD = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]


class ForkServer:
    """A process that has imported `modules` and forks others from itself. It ends with the process that made it."""

    def __init__(self, modules: list[str], environment: dict[str, str]):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.environment = environment
        self.statuses: dict[int, int] = {}  # by process id, as os.waitpid returns them
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the server
        self.process = subprocess.Popen(
            [sys.executable, "-u", __file__, str(theirs.fileno()), *modules],
            env={**environment, ROOM: " " * ROOM_BYTES},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        theirs.close()
        self.receive()  # its imports are done
        self.log.seek(0)
        output = self.log.read()
        assert not output, f"importing {', '.join(modules)} printed:\n{output}"

    def close(self) -> None:
        self.socket.close()
        self.process.wait()

    def popen(self, command: list[str], **options: Any) -> subprocess.Popen:
        """`subprocess.Popen(command, **options)`, forked from the server where `can_fork` allows it."""
        if options.get("preexec_fn") or not can_fork(command, options.get("env"), self.environment):
            return subprocess.Popen(command, **options)
        return Forked(self, command, **options)

    def spawn(self, request: dict[str, Any], streams: list[int]) -> int:
        """Fork a process with `streams` as stdin, stdout and stderr; return its id."""
        socket.send_fds(self.socket, [json.dumps(request).encode()], streams)
        while "spawned" not in (message := self.receive()):
            pass
        self.statuses.pop(message["spawned"], None)  # of a process that had this id before
        return message["spawned"]

    def receive(self) -> dict[str, int]:
        data = self.socket.recv(MESSAGE_BYTES)
        if not data:
            self.log.seek(0)
            raise RuntimeError(f"the fork server died with status {self.process.wait()}:\n{self.log.read()}")
        message = json.loads(data)
        if "ended" in message:
            self.statuses[message["ended"]] = message["status"]
        return message

    def status(self, pid: int, seconds: float) -> int | None:
        """The wait status of a process that has ended, or ends within `seconds`; else None."""
        while pid not in self.statuses and select.select([self.socket], [], [], seconds)[0]:
            self.receive()
        return self.statuses.pop(pid, None)


class Forked(subprocess.Popen):
    """A Popen whose process is forked by a server, which is its parent and waits for it."""

    def __init__(self, server: ForkServer, command: list[str], **options: Any):
        self.server = server
        super().__init__(command, **options)

    def _execute_child(self, *given: Any) -> None:
        options = arguments_of(self, given)
        names = ("p2cread", "c2pwrite", "errwrite")
        streams = [number if options[name] == -1 else options[name] for number, name in enumerate(names)]
        request = {"command": options["args"][1:], "cwd": str(options["cwd"] or Path.cwd()), "env": options["env"]}
        self.pid = self.server.spawn({**request, "env": dict(request["env"] or os.environ)}, streams)
        self._child_created = True
        close_pipes(self, options)

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:  # type: ignore[override]
        if self.returncode is None and (status := self.server.status(self.pid, 0)) is not None:
            self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode

    def _try_wait(self, flags: int) -> tuple[int, int]:
        status = self.server.status(self.pid, 0 if flags & os.WNOHANG else 0.05)
        return (0, 0) if status is None else (self.pid, status)


class ForkingPopen(subprocess.Popen):
    """A Popen that forks its own process instead of executing Python anew: in a launcher that a server runs."""

    def _execute_child(self, *given: Any) -> None:
        options = arguments_of(self, given)
        if not can_fork(options["args"], options["env"], SERVER_ENVIRONMENT):
            return super()._execute_child(*given)  # type: ignore[misc]
        streams = [options[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self.pid = os.fork()
        if not self.pid:
            if options["start_new_session"]:
                os.setsid()
            reset_signals()
            for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
                finalizer.detach()  # else the child would remove its parent's temporary folders when it ends
            if options["preexec_fn"]:
                options["preexec_fn"]()
            become(options["args"][1:], options["cwd"], options["env"], streams)
        self._child_created = True
        close_pipes(self, options)
        return None


def can_fork(command: list[str], env: dict[str, str] | None, server: dict[str, str]) -> bool:
    """Whether a fork of a server with that environment is the same as executing `command`."""
    env = dict(os.environ) if env is None else env
    changed = {name for name in env.keys() | server.keys() if env.get(name) != server.get(name)}
    if folders(env) == folders(server):
        changed.discard("PATH")
    words = [word for word in command[1:3] if word != "-u"]
    script = words[:1] == ["-m"] or (bool(words) and words[0].endswith(".py"))
    return command[0] == sys.executable and script and all(FORKED.fullmatch(name) for name in changed)


def folders(env: dict[str, str]) -> list[str]:
    """Where programs are looked up. tools.accept puts its Python's folder in front, where it often is already."""
    return list(dict.fromkeys(env.get("PATH", "").split(":")))


def arguments_of(popen: subprocess.Popen, given: tuple) -> dict[str, Any]:
    """The arguments of subprocess.Popen._execute_child by name; their order depends on Python's version."""
    return EXECUTE_CHILD.bind(popen, *given).arguments


def close_pipes(popen: Any, options: dict[str, Any]) -> None:
    names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    popen._close_pipe_fds(*(options[name] for name in names))


def serve(connection: socket.socket) -> NoReturn:
    """Fork what is asked for, and report how it ended, until the connection is closed."""
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(ended, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    connection.send(json.dumps({"ready": os.getpid()}).encode())
    children: set[int] = set()
    while True:
        ready, _, _ = select.select([connection.fileno(), ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            while children and (end := os.waitpid(-1, os.WNOHANG))[0]:
                children.remove(end[0])
                connection.send(json.dumps({"ended": end[0], "status": end[1]}).encode())
        if connection.fileno() in ready:
            data, streams, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
            if not data:
                os._exit(0)  # and PR_SET_PDEATHSIG ends the children
            if not (pid := os.fork()):
                signal.set_wakeup_fd(-1)
                connection.detach()
                request = json.loads(data)
                reset_signals()
                os.setsid()
                LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
                become(request["command"], request["cwd"], request["env"], streams)
            children.add(pid)
            for stream in streams:
                os.close(stream)
            connection.send(json.dumps({"spawned": pid}).encode())


def reset_signals() -> None:
    """As a new Python has them: handlers of the process that forked this one are gone."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def become(command: list[str], cwd: Any, env: dict[str, str] | None, streams: list[int]) -> NoReturn:
    """Turn this forked process into `python COMMAND`, run it to its end, and exit as Python does."""
    for number, stream in enumerate(streams):
        if stream not in (-1, number):
            os.dup2(stream, number)
    for number, name in ((1, "stdout"), (2, "stderr")):  # the server's remember whether its own files could seek
        encoding, errors = getattr(sys, name).encoding, getattr(sys, name).errors
        file: Any = io.FileIO(number, "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(file, encoding, errors, write_through=True))
    os.closerange(3, os.sysconf("SC_OPEN_MAX") if sys.platform != "linux" else highest_descriptor() + 1)
    if cwd:
        os.chdir(cwd)
    if env is not None:
        os.environ.clear()
        os.environ.update({**SET_BY_IMPORTS, **env})
    show_environment()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    for name in [name for name, module in sys.modules.items() if name not in KEPT and is_own(module)]:
        del sys.modules[name]
    importlib.invalidate_caches()
    sys.orig_argv = [sys.executable, *command]
    words = command[1:] if command[0] == "-u" else command
    if words[0] == "-m" and words[1] in FORKING:
        subprocess.Popen = ForkingPopen  # type: ignore[misc]
    if words[0] == "-m":
        sys.path[:] = [str(Path.cwd()), *PATH]
        sys.argv = words[1:]
    else:
        sys.path[:] = [str(Path(words[0]).resolve().parent), *PATH]
        sys.argv = words
    if sys.path[0] == str(ROOT):
        sys.modules.update(OWN_MODULES)
    leave(run_main(words[0], words[1] if words[0] == "-m" else ""))


def highest_descriptor() -> int:
    return max(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208  # no Path: it is called hundreds of times


def is_own(module: Any) -> bool:
    """Whether a module is not one of Python's or of an installed package."""
    places = [getattr(module, "__file__", None) or "", *(getattr(module, "__path__", None) or ())]
    installed = (sys.prefix, sys.base_prefix)
    return any(place and not place.startswith(installed) for place in places)


def show_environment() -> None:
    """Write the environment where /proc/PID/environ shows it: into the value of ROOM, behind the server's own."""
    if address := ROOM_ADDRESS[0]:
        block = b"".join(b"\0" + name + b"=" + value for name, value in os.environb.items())
        ctypes.memmove(address, block.ljust(ROOM_BYTES, b"\0")[:ROOM_BYTES], ROOM_BYTES)


def run_main(script: str, module: str) -> int:
    """Execute the script or module as __main__; returns the exit status, after a traceback where one is due."""
    main, _server = types.ModuleType("__main__"), sys.modules["__main__"]  # this module stays alive
    sys.modules["__main__"] = main
    try:
        if module:
            runpy._run_module_as_main(module)  # type: ignore[attr-defined]
        else:
            path = f"{Path.cwd()}/{script}" if not script.startswith("/") else script
            vars(main).update(__file__=path, __builtins__=__builtins__)
            exec(compile(Path(script).read_bytes(), path, "exec"), vars(main))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


def leave(status: int) -> NoReturn:
    """Exit as Python does, without a return to what called this: that belongs to another program.

    Python would also free all objects. That takes half a second, because every page of the server is copied for it.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    vars(sys.modules["__main__"]).clear()  # closes files that were left open
    os._exit(status & 0xFF)


def draw_figure() -> None:
    """Find the fonts and measure the letters that the first figure of a process needs: half of what it takes."""
    figure = sys.modules["matplotlib.figure"].Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="steps", ylabel="loss")
    axes.plot([0, 30_000], [0, 5.5], label="run, best 0.123")
    axes.set_title("validation loss", loc="left")
    axes.legend()
    figure.savefig(io.BytesIO())


def main(connection: int, modules: list[str]) -> NoReturn:
    del sys.path[0]  # tests/
    LIBC.getenv.restype = ctypes.c_void_p
    ROOM_ADDRESS[0] = LIBC.getenv(ROOM.encode()) or 0
    del os.environ[ROOM]
    SERVER_ENVIRONMENT.update(os.environ)
    os.environ["DS_ACCELERATOR"] = "cpu"  # as train_deepspeed.py sets it on CPU ranks before it imports DeepSpeed
    for name in modules:
        importlib.import_module(name)
    del os.environ["DS_ACCELERATOR"]
    if "matplotlib.figure" in sys.modules:
        draw_figure()
    KEPT.update(sys.modules)
    sys.path.insert(0, str(ROOT))
    for name in OWN:
        importlib.import_module(name)
    OWN_MODULES.update({name: module for name, module in sys.modules.items() if name not in KEPT and is_own(module)})
    del sys.path[0]
    tasks = Path("/proc/self/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "an import has started threads: a fork loses them"
    PATH.extend(sys.path)
    SET_BY_IMPORTS.update(os.environ.items() - SERVER_ENVIRONMENT.items())
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    serve(socket.socket(fileno=connection))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
