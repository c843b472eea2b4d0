"""What all commands share: exit statuses, errors of one line, files written atomically. Imports no large library."""

import contextlib
import errno
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path


# docs/command_line.md lists them.
DONE, BAD_IMAGES, BAD_COMMAND, BAD_OUTPUT = 0, 1, 2, 3
FAILED = BAD_IMAGES
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# Only writing can cause these system errors.
CANNOT_WRITE = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EROFS", "EFBIG")} - {None}


class OutputError(OSError):
    """An output can't be written; names the file and the reason."""


def output_error(error: BaseException | None) -> OutputError | None:
    """The error of writing that an error is or was caused by; `None` where there is none."""
    while error is not None:
        if isinstance(error, OutputError):
            return error
        # `datasets` compares sizes before it writes.
        if isinstance(error, OSError) and (error.errno in CANNOT_WRITE or "Not enough disk space" in str(error)):
            # pyarrow's errors don't name the file.
            cache = getattr(sys.modules.get("datasets"), "config", None)
            unnamed = f"an output, probably the cache in HF_DATASETS_CACHE ({cache.HF_DATASETS_CACHE})" if cache else ""
            return OutputError(f"cannot write {error.filename or unnamed or 'an output'}: {error.strerror or error}")
        error = error.__cause__
    return None


class CommandError(Exception):
    """A command failed although its arguments and outputs are valid; exit status 1."""


class Terminated(SystemExit):  # noqa: N818 - not an error
    """Raised by SIGTERM, so that files are closed and locks released as after SIGINT."""


def terminate(number: int, frame) -> None:
    if hasattr(signal, "SIGCHLD"):
        # A scheduler terminates data loader workers too; PyTorch would raise an error for each.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise Terminated(TERMINATED)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Converts errors of writing to `OutputError`; other errors, also transformers' without an errno, pass through."""
    try:
        yield
    except Exception as error:
        is_system = isinstance(error, OSError) and error.errno is not None
        # Those of safetensors and tokenizers, which have types of their own.
        is_rust = "(os error " in str(error) or "Os { code: " in str(error)
        if isinstance(error, (BrokenPipeError, OutputError, ValueError)) or not (is_system or is_rust):
            raise
        raise OutputError(f"cannot write {path}: {error.strerror if is_system else error}") from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a new path beside `path`, which the file there replaces if the block succeeds.

    No reader sees half a file, and an error or a kill leaves the earlier file. Raises `OutputError`.
    """
    path = Path(path)
    # Short, and unique also if machines or containers, with the same process ids, share the folder.
    aside = path.with_name(f".tinycap-{uuid.uuid4().hex[:16]}{path.suffix}")
    try:
        with writing(path):
            yield aside
            os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Writes a file atomically; see `replacing`."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def say(name: str, text: str) -> None:
    # Standard error may be a file on a full disk.
    with contextlib.suppress(OSError):
        print(f"{name}: {text}", file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    """The first line of an error message, without the hints that libraries append."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def run_command(name: str, main: Callable[[], object], resume: str = "start it again") -> int:
    """Runs a command and returns its exit status: that of `main` if it is an int.

    Errors that the user can mend are one line on standard error, without a traceback.

    Args:
        name: of the command, in messages.
        resume: what to do after an interruption.
    """
    if sys.stderr is None:
        # Closed: `print` would write messages to the standard output.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    handler = None
    if threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGTERM, terminate)
    try:
        try:
            status = main()
            return status if type(status) is int else DONE
        finally:
            if sys.stdout is not None:
                with writing("to the standard output"):
                    sys.stdout.flush()
    except (KeyboardInterrupt, Terminated) as stop:
        what, status = ("terminated", TERMINATED) if isinstance(stop, Terminated) else ("interrupted", INTERRUPTED)
        say(name, f"{what}; {resume}")
        return status
    except BrokenPipeError:
        # The reader, such as `head`, closed the pipe.
        return DONE
    except (CommandError, FloatingPointError) as error:
        say(name, f"error: {error}")
        return FAILED
    except (ValueError, ImportError, OSError) as error:
        error = output_error(error) or error
        say(name, f"error: {error}")
        return BAD_OUTPUT if isinstance(error, OutputError) else BAD_COMMAND
    finally:
        drop_standard_output()
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


def drop_standard_output() -> None:
    """Discards what can't be written, since Python would raise again when it closes the stream."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
