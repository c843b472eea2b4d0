"""The training loop of both training scripts: batches, steps, stopping by signal, logging."""

import argparse
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from tinycap.training.checkpoints import CheckpointWriteError
from tinycap.training.run_folder import RunFolder
from tinycap.training.streaming import StreamingCaptionDataset


logger = get_logger(__name__)

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class NonFiniteLossError(FloatingPointError):
    """A loss is infinite or NaN; the run stops, its last checkpoint is intact."""


def check_finite(losses: dict[str, torch.Tensor], step: int, image_ids: list[str]) -> None:
    """Raises `NonFiniteLossError`, naming the step, the losses and the batch's images, unless all are finite."""
    if all(torch.isfinite(loss) for loss in losses.values()):
        return
    raise NonFiniteLossError(
        f"step {step}: expected finite losses, got { ({name: loss.item() for name, loss in losses.items()}) } on the "
        f"images with the ids {', '.join(image_ids)}; the last checkpoint is intact; try a lower --learning_rate, and "
        "look at these images"
    )


class TrainBatches:
    """A process's training batches, epoch by epoch and from any position on.

    Not prepared by accelerate, which repeats or drops images to give every process equally many batches. The sampler
    or the stream selects this process's share.

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
        """The batches of an epoch; a stream ignores `first_batch` and continues from `load_state_dict`."""
        if self.is_stream:
            self.loader.dataset.set_epoch(epoch)
        else:
            self.loader.batch_sampler.set_position(epoch, first_batch)
        if not self.finished:
            for batch in self.loader:
                yield send_to_device(batch, self.device)
        # Until all processes have finished: a checkpoint in between must not restart the epoch.
        self.finished = self.is_stream

    def begin_epoch(self) -> None:
        """Called when all processes have finished the epoch before."""
        self.finished = False

    def state_dict(self) -> dict | None:
        """The position in a stream, as JSON; `None` for a data set, whose epoch and batch suffice."""
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
    """One optimizer step's batches on this process, with each batch's share of the whole step.

    Args:
        batches: as many as on every other process.
        image_shares, token_shares: for each batch, its images (its caption tokens) over the mean per process. With
            them as weights, the mean of the processes' summed losses is the mean over all images (all tokens), however
            unevenly they are distributed.
        num_images: of all batches and processes.
        waited: seconds that this process waited for its batches.
        stop: the signal that some process received, 0 if none; this is the last step then.
    """

    batches: list[dict]
    image_shares: list[float]
    token_shares: list[float]
    num_images: int
    waited: float
    stop: int


def steps_of(
    accelerator: Accelerator,
    batches: Iterable[dict],
    accumulation: int,
    signals: "StopSignals",
    dummy_batch: Callable[[], dict] | None = None,
) -> Iterator[Step]:
    """Groups an epoch's batches into optimizer steps that all processes take together, until none has a batch left.

    Args:
        batches: of this process.
        accumulation: batches in a step.
        signals: polled once a step.
        dummy_batch: returns a batch of weight zero, for a process whose batches are used up before the others'.
    """
    batches = iter(batches)
    while True:
        since = time.perf_counter()
        window = list(islice(batches, accumulation))
        waited = time.perf_counter() - since
        images = [len(batch["image_ids"]) for batch in window]
        tokens = [int((batch["labels"] != -100).sum()) for batch in window]
        mine = torch.tensor([[len(window), sum(images), sum(tokens), signals.received]])
        everyone = accelerator.gather(mine.to(accelerator.device)).cpu() if accelerator.num_processes > 1 else mine
        length = int(everyone[:, 0].max())
        if length == 0:
            return
        if len(window) < length:
            missing = length - len(window)
            window += [send_to_device(dummy_batch(), accelerator.device)] * missing
            images, tokens = images + [0] * missing, tokens + [0] * missing
        # A step of mixed images only has no captions.
        num_images, num_tokens = int(everyone[:, 1].sum()), max(1, int(everyone[:, 2].sum()))
        yield Step(
            batches=window,
            image_shares=[count * accelerator.num_processes / num_images for count in images],
            token_shares=[count * accelerator.num_processes / num_tokens for count in tokens],
            num_images=num_images,
            waited=waited,
            stop=int(everyone[:, 3].max()),
        )


@dataclass
class Evaluation:
    """The metrics of a validation, and a caption for each validation image, in order, where there are any."""

    metrics: dict[str, float]
    captions: list[str] | None = None


class StoppedBySignal(SystemExit):  # noqa: N818 - not an error
    """Raised after SIGTERM or SIGINT once a checkpoint is saved; exit status 143 or 130."""


class StopSignals:
    """Records SIGTERM (sent before preemption) and SIGINT (Ctrl-C); a second SIGINT stops at once.

    The run ends after the next step, since all processes must agree before they take it. A context manager; without
    effect outside the main thread, the only one in which Python handles signals.
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
            # Not by print or tqdm, which are not reentrant: the signal may interrupt them.
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
    """Calls a script's `main`; errors that the user can mend end it in one line, without a traceback."""
    try:
        main()
    except (ValueError, NonFiniteLossError, CheckpointWriteError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        print(f"\nStopped. Resume from the newest checkpoint:\n  {resume_command()}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


class StepMeter:
    """Accumulates the losses and times of the steps between two log rows."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._reset()

    def _reset(self) -> None:
        self.sums, self.num_images, self.waited, self.since = {}, 0, 0.0, time.perf_counter()

    def add(self, step: Step, losses: dict[str, torch.Tensor]) -> None:
        for name, value in losses.items():
            self.sums.setdefault(name, []).append(value)
        self.num_images, self.waited = self.num_images + step.num_images, self.waited + step.waited

    def row(self) -> dict[str, float]:
        """Means over steps and processes, images per second and the share of the time spent waiting for batches."""
        means = {
            name: self.accelerator.reduce(torch.stack(values).mean(), "mean").item()
            for name, values in self.sums.items()
        }
        seconds = time.perf_counter() - self.since
        row = {**means, "images_per_second": self.num_images / seconds, "waiting_share": self.waited / seconds}
        self._reset()
        return row

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of validations and checkpoints."""
        since = time.perf_counter()
        yield
        self.since += time.perf_counter() - since


def run_steps(
    args: argparse.Namespace,
    accelerator: Accelerator,
    batches: TrainBatches,
    lr_scheduler,
    run: RunFolder,
    take_step: Callable[[Step, int], dict[str, torch.Tensor]],
    validate: Callable[[], Evaluation],
    dummy_batch: Callable[[], dict] | None = None,
) -> Evaluation:
    """The loop: optimizer steps until `args.max_train_steps`, with log rows, validations and checkpoints between them.

    Args:
        args: of either script.
        batches: of this process.
        lr_scheduler: for the learning rate that is logged.
        run: resumed; its `state` and `log` follow the steps.
        take_step: takes the optimizer step of this number; returns this process's named scalars, whose mean over
            the processes is the step's.
        validate: evaluates the model.
        dummy_batch: see `steps_of`.

    Returns:
        The validation after the last step.

    Raises:
        StoppedBySignal: SIGTERM or SIGINT was received; a checkpoint of this step is saved.
        ValueError: an epoch held no usable image.
    """
    state, meter = run.state, StepMeter(accelerator)
    with StopSignals() as signals:
        while state["step"] < args.max_train_steps:
            epoch = batches.epoch(state["epoch"], state["batch"])
            for step in steps_of(accelerator, epoch, args.gradient_accumulation_steps, signals, dummy_batch):
                meter.add(step, take_step(step, state["step"] + 1))
                state.update(step=state["step"] + 1, batch=state["batch"] + len(step.batches))
                is_last = state["step"] >= args.max_train_steps
                if state["step"] % args.logging_steps == 0 or is_last:
                    row = {**meter.row(), "learning_rate": lr_scheduler.get_last_lr()[0]}
                    run.log.train_row(state["step"], state["epoch"], row)
                with meter.paused():
                    is_due = args.evaluation_steps and state["step"] % args.evaluation_steps == 0
                    if is_due and not (is_last or step.stop):
                        run.log_validation(validate().metrics)
                    if state["step"] % run.checkpointing_steps == 0 or is_last or step.stop:
                        run.save_checkpoint(batches)
                run.log.advance(state["step"])
                if is_last:
                    break
                if step.stop:
                    command = resume_command(accelerator.num_processes)
                    logger.warning("Saved a checkpoint and stopped at step %d. Resume:\n  %s", state["step"], command)
                    raise StoppedBySignal(128 + step.stop)
            else:
                if state["batch"] == 0:
                    raise ValueError(f"split {args.train_split}: expected at least one usable image, got none")
                state.update(epoch=state["epoch"] + 1, batch=0)
                batches.begin_epoch()
    evaluation = validate()
    run.log_validation(evaluation.metrics)
    run.log.close()
    return evaluation


def create_accelerator(args: argparse.Namespace, **ddp_options) -> Accelerator:
    """The accelerator of a training script, with logging and CPU threads set up.

    Args:
        ddp_options: of `DistributedDataParallelKwargs`.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(**ddp_options)],
    )
    set_up_logging(accelerator)
    set_cpu_threads(accelerator)
    return accelerator


def available_cores() -> int:
    """CPU cores that this process may use: its affinity, within a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = map(int, CGROUP_QUOTA.read_text().split())
    except (OSError, ValueError):
        # No cgroup v2, or a quota of "max".
        return cores
    return max(1, min(cores, quota // period))


def set_cpu_threads(accelerator: Accelerator) -> None:
    """Gives a single process on a CPU one thread for each core.

    `accelerate launch` sets OMP_NUM_THREADS to 1 unless it was configured for a CPU, which doubles the training time
    on two cores. Without a launcher, or with several processes, the environment decides.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1 and launched:
        torch.set_num_threads(available_cores())


class ProgressBarHandler(logging.Handler):
    """Writes messages to stderr without breaking the progress bar there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def is_relevant(record: logging.LogRecord) -> bool:
    """False for the libraries' warnings about intended behaviour.

    Checkpoints hold tied weights once, and `load_checkpoint` ties them again. A resumed shuffle buffer is empty, as
    that of a stream always is; see `StreamingCaptionDataset`. A tokenizer is read
    without the class of its model.
    """
    expected = ("Removed shared tensor", "shuffle buffer", "You are using a model of type")
    return not any(text in str(record.msg) for text in expected)


def set_up_logging(accelerator: Accelerator) -> None:
    """One line a message; the libraries log on each machine's first process only."""
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
    for verbose in ("httpx", "accelerate"):
        logging.getLogger(verbose).setLevel(logging.WARNING)
    for name in ("accelerate.utils.other", "datasets.iterable_dataset", "transformers.configuration_utils"):
        logging.getLogger(name).addFilter(is_relevant)
