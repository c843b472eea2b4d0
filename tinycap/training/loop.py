"""The pieces of a training loop that both training scripts share."""

import argparse
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from tinycap.training.checkpoints import CheckpointWriteError, save_checkpoint
from tinycap.training.data import StreamingCaptionDataset
from tinycap.training.logs import RunLog


logger = get_logger(__name__)

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class NonFiniteLossError(FloatingPointError):
    """The loss became infinite or no number at all; the run stops, its last checkpoint is intact."""


def check_finite(losses: dict[str, torch.Tensor], step: int, image_ids: list[str]) -> None:
    """Raises `NonFiniteLossError`, naming the step, the losses and the batch's photos, unless all are finite."""
    if all(torch.isfinite(loss) for loss in losses.values()):
        return
    raise NonFiniteLossError(
        f"step {step}: expected finite losses, got { ({name: loss.item() for name, loss in losses.items()}) } on the "
        f"photos with the ids {', '.join(image_ids)}; the last checkpoint is intact, and a lower --learning_rate or a "
        "look at these photos is what usually helps"
    )


class TrainBatches:
    """A process's training batches, epoch by epoch and from any place on.

    Not accelerate's to divide: its way of giving every process as many batches as the others is to show some photos
    twice or to leave some out. The sampler or the stream knows which share is this process's.

    Args:
        loader: of a data set, with an `EpochBatchSampler`; or a `StatefulDataLoader` of a stream.
        device: where the batches go.
    """

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader = loader
        self.device = device
        self.is_stream = isinstance(loader.dataset, StreamingCaptionDataset)
        self.finished = False

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[dict]:
        """The batches of an epoch; a stream goes on where `load_state_dict` said, whatever `first_batch` is."""
        if self.is_stream:
            self.loader.dataset.set_epoch(epoch)
        else:
            self.loader.batch_sampler.set_position(epoch, first_batch)
        if not self.finished:
            for batch in self.loader:
                yield send_to_device(batch, self.device)
        # Until the others have finished too: a checkpoint in between must not begin the epoch again.
        self.finished = self.is_stream

    def begin_epoch(self) -> None:
        """All processes have come to the end of the epoch before."""
        self.finished = False

    def state_dict(self) -> dict | None:
        """Where a stream stands, as JSON; a data set's place is its epoch and batch, and needs no more."""
        if not self.is_stream:
            return None
        return {"finished": self.finished, "loader": None if self.finished else self.loader.state_dict()}

    def load_state_dict(self, state: dict | None) -> None:
        if state is None:
            return
        self.finished = state["finished"]
        if not self.finished:
            self.loader.load_state_dict(state["loader"])


@dataclass
class Step:
    """One optimizer step's batches on this process, and what part each is of the whole step's.

    Args:
        batches: as many as on every other process.
        photo_shares, token_shares: for each batch, its photos (its caption tokens) over the mean of a process's. With
            them as weights, the mean of the processes' summed losses is the mean over all photos (all tokens), however
            unevenly they are spread.
        num_photos: of all batches and processes.
        waited: seconds that this process waited for its batches.
        stop: the signal by which some process was asked to stop, 0 if none was; this is to be the last step then.
    """

    batches: list[dict]
    photo_shares: list[float]
    token_shares: list[float]
    num_photos: int
    waited: float
    stop: int


def steps_of(
    accelerator: Accelerator,
    batches: Iterable[dict],
    accumulation: int,
    signals: "StopSignals",
    blank: Callable[[], dict] | None = None,
) -> Iterator[Step]:
    """Groups an epoch's batches to optimizer steps that all processes take together, until none has a batch left.

    Args:
        batches: of this process.
        accumulation: batches in a step.
        signals: asked once a step.
        blank: gives a batch that counts for nothing, with which a process whose batches are used up keeps step.
    """
    batches = iter(batches)
    while True:
        since = time.perf_counter()
        window = list(islice(batches, accumulation))
        waited = time.perf_counter() - since
        photos = [len(batch["image_ids"]) for batch in window]
        tokens = [int((batch["labels"] != -100).sum()) for batch in window]
        mine = torch.tensor([[len(window), sum(photos), sum(tokens), signals.received]])
        everyone = accelerator.gather(mine.to(accelerator.device)).cpu() if accelerator.num_processes > 1 else mine
        length = int(everyone[:, 0].max())
        if length == 0:
            return
        if len(window) < length:
            missing = length - len(window)
            window += [send_to_device(blank(), accelerator.device)] * missing
            photos, tokens = photos + [0] * missing, tokens + [0] * missing
        # A step of mixed pictures alone has no captions.
        num_photos, num_tokens = int(everyone[:, 1].sum()), max(1, int(everyone[:, 2].sum()))
        yield Step(
            batches=window,
            photo_shares=[count * accelerator.num_processes / num_photos for count in photos],
            token_shares=[count * accelerator.num_processes / num_tokens for count in tokens],
            num_photos=num_photos,
            waited=waited,
            stop=int(everyone[:, 3].max()),
        )


class StoppedError(SystemExit):
    """The run was asked to stop and did, behind a checkpoint; exits as a process does that the signal ended."""


class StopSignals:
    """Ends the run after the next step when it is asked to stop: all processes must know before they take it.

    SIGTERM is what schedulers send before they take a machine back, SIGINT is Ctrl-C; a second SIGINT stops at once. As
    a context manager, only in the main thread, which is the only one that Python lets handle signals.
    """

    def __init__(self):
        self.received = 0

    def __enter__(self) -> "StopSignals":
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if number == signal.SIGINT:
            # The progress bar may be in the middle of a line, and of a call that can't be entered twice.
            os.write(2, b"\nStopping after the next step; Ctrl-C again stops at once, without a checkpoint.\n")


def ignore_interrupts(worker: int) -> None:
    """A data loader's `worker_init_fn`: Ctrl-C reaches the workers too, which the last step still needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def resume_command(num_processes: int = 1) -> str:
    """The command line of this process with `--resume_from_checkpoint latest`."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or num_processes > 1
    launcher = ["accelerate", "launch"] if launched else ["python"]
    if num_processes > 1:
        launcher += ["--num_processes", str(num_processes)]
    words, arguments = [sys.argv[0]], iter(sys.argv[1:])
    for word in arguments:
        if word == "--resume_from_checkpoint":
            next(arguments, None)
        elif word != "--overwrite_output_dir" and not word.startswith("--resume_from_checkpoint="):
            words.append(word)
    return shlex.join([*launcher, *words, "--resume_from_checkpoint", "latest"])


def run_script(main: Callable[[], object]) -> None:
    """Calls a script's `main`; errors that say what to do about them end it in one line, without a traceback."""
    try:
        main()
    except (ValueError, NonFiniteLossError, CheckpointWriteError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        print(f"\nStopped. This goes on from the newest checkpoint:\n  {resume_command()}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def run_steps(
    args: argparse.Namespace,
    accelerator: Accelerator,
    batches: TrainBatches,
    scheduler,
    state: dict,
    log: RunLog,
    take_step: Callable[[Step, int], dict[str, torch.Tensor]],
    validate: Callable[[], dict[str, float]],
    checkpointing_steps: int,
    blank: Callable[[], dict] | None = None,
) -> None:
    """The loop: optimizer steps until `args.max_train_steps`, with log rows, validations and checkpoints between them.

    Args:
        args: of either script; `max_train_steps` is set by now.
        batches: this process's.
        scheduler: for the learning rate that is logged.
        state: where the run stands: `step`, `epoch`, and `batch`, the batches of the epoch that are done.
        take_step: takes the optimizer step of this number; returns this process's named scalars, whose mean over
            the processes is the step's.
        validate: gives the figures of a validation.
        checkpointing_steps: steps between checkpoints.
        blank: gives a batch that counts for nothing; see `steps_of`.

    Raises:
        StoppedError: the run was asked to stop (SIGTERM, SIGINT); a checkpoint of this step is saved.
        ValueError: an epoch held no photo at all.
    """
    sums, images, waited, since = {}, 0, 0.0, time.perf_counter()
    with StopSignals() as signals:
        while state["step"] < args.max_train_steps:
            epoch = batches.epoch(state["epoch"], state["batch"])
            for step in steps_of(accelerator, epoch, args.gradient_accumulation_steps, signals, blank):
                for name, value in take_step(step, state["step"] + 1).items():
                    sums.setdefault(name, []).append(value)
                state.update(step=state["step"] + 1, batch=state["batch"] + len(step.batches))
                is_last = state["step"] >= args.max_train_steps
                images, waited = images + step.num_photos, waited + step.waited
                if state["step"] % args.logging_steps == 0 or is_last:
                    row = {
                        name: accelerator.reduce(torch.stack(values).mean(), "mean").item()
                        for name, values in sums.items()
                    }
                    row["learning_rate"] = scheduler.get_last_lr()[0]
                    seconds = time.perf_counter() - since
                    row.update(images_per_second=images / seconds, waiting_share=waited / seconds)
                    log.train_row(state["step"], state["epoch"], row)
                    sums, images, waited, since = {}, 0, 0.0, time.perf_counter()
                paused = time.perf_counter()
                is_due = args.evaluation_steps and state["step"] % args.evaluation_steps == 0
                if is_due and not (is_last or step.stop):
                    log.eval_row(state["step"], state["epoch"], validate())
                if state["step"] % checkpointing_steps == 0 or is_last or step.stop:
                    limit = args.checkpoints_total_limit
                    save_checkpoint(accelerator, args.output_dir, state, limit, batches.state_dict())
                since += time.perf_counter() - paused
                log.advance(state["step"])
                if is_last:
                    return
                if step.stop:
                    command = resume_command(accelerator.num_processes)
                    logger.warning("Stopped, with a checkpoint. This goes on at step %d:\n  %s", state["step"], command)
                    raise StoppedError(128 + step.stop)
            if state["batch"] == 0:
                raise ValueError(f"split {args.train_split}: expected at least one usable photo, got none")
            state.update(epoch=state["epoch"] + 1, batch=0)
            batches.begin_epoch()


def available_cores() -> int:
    """CPU cores that this process may use: those of its affinity, within a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = map(int, CGROUP_QUOTA.read_text().split())
    except (OSError, ValueError):
        # No cgroup v2, or a quota of "max".
        return cores
    return max(1, min(cores, quota // period))


def set_cpu_threads(accelerator: Accelerator) -> None:
    """Gives a single process on a CPU one thread for each core.

    `accelerate launch` sets OMP_NUM_THREADS to 1 unless it was told to expect a CPU, and training takes twice as long
    on two cores. Without a launcher, or with several processes, the environment decides.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1 and launched:
        torch.set_num_threads(available_cores())


class ProgressBarHandler(logging.Handler):
    """Writes messages to stderr without breaking the progress bar that stands there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def is_news(record: logging.LogRecord) -> bool:
    """False for the libraries' warnings of what is meant to be so.

    Checkpoints hold tied weights once, and `load_checkpoint` ties them again. A resumed shuffle buffer is empty; a
    stream's holds nothing, see `StreamingCaptionDataset`. A tokenizer is read without the class of its model.
    """
    expected = ("Removed shared tensor", "shuffle buffer", "You are using a model of type")
    return not any(text in str(record.msg) for text in expected)


def set_up_logging(accelerator: Accelerator) -> None:
    """One line a message; the libraries speak up on each machine's first process only."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO,
        handlers=[ProgressBarHandler()],
    )
    for library in (datasets.utils.logging, transformers.utils.logging):
        library.set_verbosity_warning() if accelerator.is_local_main_process else library.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    for chatty in ("httpx", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for name in ("accelerate.utils.other", "datasets.iterable_dataset", "transformers.configuration_utils"):
        logging.getLogger(name).addFilter(is_news)
