"""The training loop of both scripts: batches, optimizer steps, stopping by signal; and a script's set-up."""

import argparse
import atexit
import logging
import math
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import islice
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, send_to_device
from tqdm.auto import tqdm

from tinycap.commands import run_command
from tinycap.training.checkpoints import seed_step
from tinycap.training.run_folder import RunFolder
from tinycap.training.train_batches import TrainBatches
from tinycap.workers import start_worker


logger = get_logger(__name__)

# For processes to find one another, and to come to the same step.
PROCESS_TIMEOUT = timedelta(minutes=10)
# For one process to decode a dataset or to compute a teacher's embeddings.
SLOW_TIMEOUT = timedelta(days=2)
# Seconds for the last step and its checkpoint, once the launcher has ended.
STOP_TIMEOUT = 20.0
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# Warnings about what is intended, by logger: checkpoints hold tied weights once, a stream is resumed with an empty
# shuffle buffer, and a tokenizer is read without its model's class.
EXPECTED_WARNINGS = {
    "accelerate.utils.other": "Removed shared tensor",
    "datasets.iterable_dataset": "shuffle buffer",
    "transformers.configuration_utils": "You are using a model of type",
}


# --- steps ----------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """One optimizer step's batches on this process, as many as on every other.

    Args:
        image_shares, token_shares: for each batch, its images (its caption tokens) over the mean per process. With
            them as weights, the mean of the processes' summed losses is the mean over all images (all tokens).
        num_images: of all batches and processes.
        stop: the signal that some process received, 0 if none; this is the last step then.
        started, waited: when this process began to wait for its batches, and for how many seconds.
        number, is_last, validates, saves: set by `optimizer_steps`; whether a validation and a checkpoint are due.
    """

    batches: list[dict]
    image_shares: list[float]
    token_shares: list[float]
    num_images: int
    stop: int
    started: float
    waited: float
    number: int = 1
    is_last: bool = False
    validates: bool = False
    saves: bool = False


def gather_counts(accelerator: Accelerator, counts: list[int]) -> torch.Tensor:
    """(processes, counts) on the CPU, gathered there: a GPU would finish all its work first."""
    everyone = [torch.tensor(counts) for _ in range(accelerator.num_processes)]
    if len(everyone) > 1:
        torch.distributed.all_gather(everyone, torch.tensor(counts), group=cpu_group(PROCESS_TIMEOUT))
    return torch.stack(everyone)


def steps_of(
    accelerator: Accelerator,
    batches: Iterable[dict],
    accumulation: int,
    signals: "StopSignals",
    dummy_batch: Callable[[], dict] | None = None,
) -> Iterator[Step]:
    """Groups an epoch's batches into steps of `accumulation`, taken by all processes until none has a batch left.

    Args:
        signals: polled once a step.
        dummy_batch: returns a batch of weight zero, for a process whose batches are used up before the others'.
    """
    batches = iter(batches)
    while True:
        started = time.perf_counter()
        window = list(islice(batches, accumulation))
        waited = time.perf_counter() - started
        images = [len(batch["image_ids"]) for batch in window]
        tokens = [batch["num_tokens"] for batch in window]
        everyone = gather_counts(accelerator, [len(window), sum(images), sum(tokens), signals.received])
        length, stop = int(everyone[:, 0].max()), int(everyone[:, 3].max())
        if length == 0:
            return
        while len(window) < length:
            window.append(send_to_device(dummy_batch(), accelerator.device))
            images.append(0)
            tokens.append(0)
        # A step of mixed images only has no captions.
        num_images, num_tokens = int(everyone[:, 1].sum()), max(1, int(everyone[:, 2].sum()))
        image_shares = [count * accelerator.num_processes / num_images for count in images]
        token_shares = [count * accelerator.num_processes / num_tokens for count in tokens]
        yield Step(window, image_shares, token_shares, num_images, stop, started, waited)


def optimizer_steps(
    run: RunFolder, batches: TrainBatches, signals: "StopSignals", dummy_batch: Callable[[], dict] | None = None
) -> Iterator[Step]:
    """The steps of a run, resumed or not, epoch by epoch; see `steps_of`. `run.state` is that after the step.

    Raises:
        StoppedBySignal: after a step whose `stop` is set, behind which the caller has saved a checkpoint.
        ValueError: an epoch held no usable image.
    """
    args, state = run.args, run.state

    def is_due(every: int | None) -> bool:
        return bool(every) and state["step"] % every == 0

    while state["step"] < args.max_train_steps:
        epoch = batches.epoch(state["epoch"], state["batch"])
        for step in steps_of(run.accelerator, epoch, args.gradient_accumulation_steps, signals, dummy_batch):
            state.update(step=state["step"] + 1, batch=state["batch"] + len(step.batches))
            step.number, step.is_last = state["step"], state["step"] >= args.max_train_steps
            # The validation after the last step comes after its checkpoint.
            step.validates = is_due(args.evaluation_steps) and not step.is_last and not step.stop
            step.saves = is_due(run.checkpointing_steps) or step.is_last or step.stop > 0
            yield step
            if step.is_last:
                return
            if step.stop:
                command = resume_command(run.accelerator.num_processes)
                logger.warning("Saved a checkpoint and stopped at step %d. Resume:\n  %s", step.number, command)
                raise StoppedBySignal(128 + step.stop)
        if state["batch"] == 0:
            raise ValueError(f"split {args.train_split}: expected at least one usable image, got none")
        state.update(epoch=state["epoch"] + 1, batch=0)
        batches.finished = False


class NonFiniteLossError(FloatingPointError):
    """A loss is infinite or NaN."""


def check_finite(losses: dict[str, float], step: int, image_ids: list[str]) -> None:
    if not all(map(math.isfinite, losses.values())):
        raise NonFiniteLossError(
            f"step {step}: expected finite losses, got {losses} on the images with the ids {', '.join(image_ids)}; the "
            "last checkpoint is intact; try a lower --learning_rate, and look at these images"
        )


def train_step(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model,
    optimizer,
    lr_scheduler,
    compute_losses: Callable[[dict], dict[str, torch.Tensor]],
    step: Step,
) -> dict[str, torch.Tensor]:
    """Takes one optimizer step.

    Args:
        compute_losses: the named losses of a batch, `loss` among them. A `caption_loss`, part of `loss` with weight 1,
            is a mean over tokens, every other one over images. One that isn't finite leaves the weights unchanged.

    Returns:
        This process's part of each loss, whose mean over the processes is the step's; `grad_norm`, if it is limited.
    """
    named, unchecked = {}, []
    for index, batch in enumerate(step.batches):
        # Dropout and patch dropout depend on the step only, so that a resumed run repeats them.
        seed_step(args.seed, step.number * args.gradient_accumulation_steps + index, accelerator.process_index)
        is_last = index == len(step.batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            losses = compute_losses(batch)
            unchecked.append(torch.stack([loss.detach().float() for loss in losses.values()]))
            images, tokens = step.image_shares[index], step.token_shares[index]
            loss = images * losses["loss"]
            if "caption_loss" in losses:
                loss = loss + (tokens - images) * losses["caption_loss"]
            accelerator.backward(loss)
        losses["loss"] = loss
        for name, value in losses.items():
            share = {"loss": 1.0, "caption_loss": tokens}.get(name, images)
            named[name] = named.get(name, 0.0) + share * value.detach()
    if args.max_grad_norm > 0:
        named["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    # The one wait for a GPU in a step, before the weights change.
    for batch, values in zip(step.batches, torch.stack(unchecked).tolist()):
        check_finite(dict(zip(losses, values)), step.number, batch["image_ids"])
    optimizer.step()
    lr_scheduler.step()
    optimizer.zero_grad()
    return named


# --- stopping ---------------------------------------------------------------------------------------------------------


class StoppedBySignal(SystemExit):  # noqa: N818 - not an error
    """Raised after SIGTERM or SIGINT once a checkpoint is saved; exit status 143 or 130."""


class StopSignals:
    """Within its context, records SIGTERM (sent before preemption) and SIGINT (Ctrl-C); a second SIGINT stops at once.

    The run ends after the next step, since all processes must agree before they take it. Without effect outside the
    main thread, the only one in which Python handles signals.
    """

    def __init__(self):
        self.received, self.previous = 0, {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
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


def init_worker(worker: int) -> None:
    """A data loader's `worker_init_fn`: Ctrl-C, and a scheduler's SIGTERM, reach the workers too, which the last step
    still needs. `end_workers` ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start_worker(worker)


@atexit.register
def end_workers() -> None:
    """Before `multiprocessing` sends its children a SIGTERM and waits for them, which those of `init_worker` ignore."""
    if hasattr(signal, "SIGCHLD"):
        # Its handler by torch takes a killed worker for a failure.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def stop_with_launcher() -> None:
    """Stops this process, with a checkpoint if it can, when its launcher has ended without it, as by kill -9.

    Without a launcher it goes on: the shell that starts a run in the background may end.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        # A step that waits for another process doesn't end.
        time.sleep(STOP_TIMEOUT)
        os._exit(128 + signal.SIGTERM)

    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        threading.Thread(target=watch, daemon=True).start()


def resume_command(num_processes: int = 1) -> str:
    """The command line of this process with `--resume_from_checkpoint latest`."""
    launcher = ["python"]
    if "ACCELERATE_MIXED_PRECISION" in os.environ or num_processes > 1:
        launcher = ["accelerate", "launch", "--num_processes", str(num_processes)]
    # Of a flag that is given twice, the second counts.
    words = [word for word in sys.argv if word != "--overwrite_output_dir"]
    return shlex.join([*launcher, *words, "--resume_from_checkpoint", "latest"])


def run_script(main: Callable[[], object]) -> None:
    """Runs a training script, and exits with its status; see `run_command`."""
    resume = f"to go on from the newest checkpoint, if there is one: {resume_command()}"
    sys.exit(run_command(Path(sys.argv[0]).name, main, resume))


# --- set-up -----------------------------------------------------------------------------------------------------------


def create_accelerator(args: argparse.Namespace, **ddp_options) -> Accelerator:
    """The accelerator of a training script, with `DistributedDataParallelKwargs`; sets up logging and CPU threads."""
    stop_with_launcher()
    handlers = [DistributedDataParallelKwargs(**ddp_options), InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)]
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=args.output_dir,
            kwargs_handlers=handlers,
        )
        if accelerator.num_processes > 1:
            # Made by all processes in the same order.
            cpu_group(PROCESS_TIMEOUT), cpu_group(SLOW_TIMEOUT)
    except RuntimeError as error:
        rank, number = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
        if number == "1":
            raise
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"process {rank} of {number}: expected all of them at {address} within {PROCESS_TIMEOUT}, got: {error}"
        ) from error
    # `accelerate launch` asks for static shapes without `--dynamo_use_dynamic`: each length of captions would be
    # compiled by itself, and after eight of them none at all. With `None`, PyTorch lets vary what it sees vary.
    accelerator.state.dynamo_plugin.dynamic = accelerator.state.dynamo_plugin.dynamic or None
    set_up_logging(accelerator)
    set_cpu_threads(accelerator)
    return accelerator


@cache
def cpu_group(timeout: timedelta):
    return torch.distributed.new_group(backend="gloo", timeout=timeout)


def wait_for_slow_process(accelerator: Accelerator) -> None:
    """A barrier after work that may take one process hours, where every other collective is bounded by minutes."""
    if accelerator.num_processes > 1:
        torch.distributed.barrier(cpu_group(SLOW_TIMEOUT))


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """accelerate's, for work of hours; all leave it together, since other machines may have to repeat the work."""
    if not accelerator.is_main_process:
        wait_for_slow_process(accelerator)
    yield
    if accelerator.is_main_process:
        wait_for_slow_process(accelerator)
    wait_for_slow_process(accelerator)


def set_cpu_threads(accelerator: Accelerator) -> None:
    """Gives a single process on a CPU one thread for each core that it may use, where `accelerate launch`, unless it
    was configured for a CPU, has set OMP_NUM_THREADS to 1."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if accelerator.device.type != "cpu" or accelerator.num_processes > 1 or not launched:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A container's quota; an error without cgroup v2, or for a quota of "max".
    with suppress(OSError, ValueError):
        quota, period = map(int, CGROUP_QUOTA.read_text().split())
        cores = max(1, min(cores, quota // period))
    torch.set_num_threads(cores)


class ProgressBarHandler(logging.Handler):
    """Writes messages to stderr without breaking the progress bar there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(accelerator: Accelerator) -> None:
    """One line a message; the libraries log on each machine's first process only."""
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=line, datefmt="%H:%M:%S", level=logging.INFO, handlers=[ProgressBarHandler()])
    for library in (datasets.utils.logging, transformers.utils.logging):
        library.set_verbosity_warning() if accelerator.is_local_main_process else library.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    for verbose in ("httpx", "accelerate"):
        logging.getLogger(verbose).setLevel(logging.WARNING)
    for name, text in EXPECTED_WARNINGS.items():
        logging.getLogger(name).addFilter(lambda record, text=text: text not in str(record.msg))
