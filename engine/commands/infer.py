"""`zsad-infer`: a folder of unlabeled images in, anomaly scores, maps and a report out."""

import argparse
import errno
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from zsad.engine.config import Config, ConfigError, load_config, preset_names
from zsad.engine.demo import draw_demo
from zsad.engine.evaluation.evaluate import Evaluation, evaluate, format_table, ground_truth
from zsad.engine.images.decode import ImageError
from zsad.engine.images.folders import Category, NothingToScoreError, scan
from zsad.engine.networks.runtime import Backbone, choose_runtime, load_backbone
from zsad.engine.pipeline import Options, Stages, TooFewImagesError, check_memory, score_category
from zsad.engine.placement import Placement, choose_placement
from zsad.engine.results.category import Format, OutputError, check_output, fingerprint, finished_record, write_category
from zsad.engine.results.report import shown_categories, write_report
from zsad.export.state_dict import CheckpointError
from zsad.export.tensorrt_engine import EngineError
from zsad.kernels.files import printable, written_whole
from zsad.kernels.machine import available_cores, peak_memory

log = logging.getLogger("zsad")

DONE, SOME_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# After these the next category would fail like the one before.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# Timings inside these stages are spent in the product library or in ONNX Runtime.
LIBRARY_STAGES = ("backbone", "product")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zsad-infer`; 0 done, 1 some inputs failed, 2 usage or configuration, 130 interrupted."""
    arguments = _parse(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("zsad: %(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    log.setLevel(logging.ERROR if arguments.quiet else logging.DEBUG if arguments.verbose else logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be Unicode
    with warnings.catch_warnings():
        # Pillow warns of large images and odd headers; what it cannot read it raises.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.showwarning = lambda message, *_: log.warning("%s", message)
        with _Interrupts() as interrupts:
            return _guarded(arguments, interrupts)


class _Interrupts:
    """Remembers Ctrl-C: an exception that a signal raises inside a finalizer is dropped by the interpreter."""

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> "_Interrupts":
        in_main_thread = threading.current_thread() is threading.main_thread()
        # Where the caller ignores the signal, or handles it, that stays so.
        self.installed = in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.installed:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, *_: object) -> None:
        self.seen = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was a Ctrl-C; called wherever a run reports progress."""
        if self.seen:
            raise KeyboardInterrupt


def _guarded(arguments: argparse.Namespace, interrupts: _Interrupts) -> int:
    """Turn what stops a run into a message and an exit code."""
    go_on = f"What was finished is in {arguments.output}; add --resume to go on from there"
    try:
        return _run(arguments, interrupts)
    except (ConfigError, CheckpointError, EngineError, OutputError, NothingToScoreError) as error:
        log.error("%s", error)
        return USAGE
    except ImageError as error:
        log.error("stopped by --strict: %s. %s", error, go_on)
        return SOME_FAILED
    except (OSError, MemoryError) as error:
        log.error("stopped: %s. %s", str(error).rstrip("."), go_on)
        return SOME_FAILED
    except KeyboardInterrupt:
        log.error("interrupted. %s", go_on)
        return INTERRUPTED


class _Formatter(logging.Formatter):
    """Keeps names of files from steering the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


def _emit(text: str) -> None:
    """Print to standard output; raises OSError when that is full or gone."""
    try:
        print(text, flush=True)
    except OSError as error:
        # The interpreter writes what is left once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="zsad-infer",
        description="Score a folder of unlabeled images: an anomaly score per image and a map per pixel, in [0, 1].",
    )
    add = parser.add_argument
    add("data", nargs="?", type=Path, help="folder of images, folder of such folders, or MVTec layout")
    add("--demo", action="store_true", help="draw a small set of images with planted defects and score that")
    add("--output", type=Path, default=Path("out"), help="results folder (default: %(default)s)")
    add("--preset", default="small", choices=preset_names(), help="(default: %(default)s)")
    add("--config", type=Path, metavar="FILE.toml", help="values that replace the preset's")
    add("--device", default="auto", help="auto, cpu, cuda:N, or cuda:N,M (default: %(default)s)")
    add("--runtime", default="auto", help="of the backbones: auto, onnxruntime, tensorrt or tensorrt-rtx")
    add("--image-size", type=int, metavar="PIXELS", help="side of the network's input, a multiple of the patch size")
    add("--taps", type=_numbers(int), metavar="5,8", help="blocks whose patch tokens are scored, 0-based")
    add("--degrees", type=_numbers(int), metavar="1,3", help="neighbourhood sizes that patches are averaged over")
    add("--interval", type=_numbers(float), metavar="0,0.3", help="part of the sorted distances that is averaged")
    add("--precision", help="of the scoring: fp32 or int8 on a CPU, fp16 or int8 on a GPU; int8 only chooses winners")
    add("--backbone-precision", help="fp32 or int8 on a CPU, fp16 or fp32 on a GPU")
    add("--group-size", type=int, metavar="N", help="score in random groups of N images: linear cost")
    add("--batch-size", type=int, metavar="N", help="images per forward pass (default: 1 on a CPU, 8 on a GPU)")
    add("--decoder", help="pillow (the default), or nvimgcodec: JPEG files on the GPU, to slightly other pixels")
    add("--workers", type=int, metavar="N", help="threads that decode and write (default: one per core)")
    add(
        "--memory-limit",
        type=_bytes,
        metavar="4GB",
        help="of what scores, above it tokens are spilled (default: 3/4 of the free memory, 9/10 on a GPU)",
    )
    add(
        "--format",
        type=_formats,
        default=["zsad"],
        metavar="zsad,rayan",
        help="zsad: tables, TIFF maps, overlays, report; rayan: the challenge's JSON files (default: zsad)",
    )
    add("--threshold", type=_threshold, metavar="0.5|auto", help="add verdicts and defect regions")
    add("--resume", action="store_true", help="keep categories that an earlier run with these settings finished")
    add("--strict", action="store_true", help="stop at the first unreadable image")
    add("--seed", type=int, help="for dealing the groups and drawing the demo (default: 0)")
    add("--json", action="store_true", help="print the run record as JSON on standard output")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="store_true", help="plans and the time per stage")
    loudness.add_argument("-q", "--quiet", action="store_true", help="errors only")
    add("--version", action="version", version=f"zsad {importlib.metadata.version('zsad')}")
    arguments = parser.parse_args(argv)
    if (arguments.data is None) != arguments.demo:
        parser.error("give a folder of images, or --demo")
    for name in ("batch_size", "workers"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return arguments


def _numbers(kind: type) -> Any:
    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be numbers separated by commas, not {text!r}") from None

    return parse


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    try:
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))  # type: ignore[index]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"must be a size like 800MB or 4GB, not {text!r}") from None


def _formats(text: str) -> list[Format]:
    chosen = text.split(",")
    if not set(chosen) <= set(get_args(Format)):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(get_args(Format))}, not {text!r}")
    return chosen  # type: ignore[return-value]


def _threshold(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto or a number in [0, 1], not {text!r}") from None


def _run(arguments: argparse.Namespace, interrupts: _Interrupts) -> int:
    start, started = time.perf_counter(), datetime.now(timezone.utc)
    of_config = {field.name for field in fields(Config)} | {"taps"}
    overrides = {k: v for k, v in vars(arguments).items() if k in of_config - {"preset"} and v is not None}
    runtime = choose_runtime(arguments.device, arguments.runtime)
    config = runtime.resolve(load_config(arguments.preset, arguments.config, overrides))
    output: Path = arguments.output
    data = arguments.data
    if arguments.demo:
        check_output(output, ())
        data = draw_demo(output / "demo-data", config.seed).parent
    categories = scan(data, exclude=output)
    check_output(output, categories)

    stages = Stages()
    batch_size = arguments.batch_size or (8 if runtime.device else 1)
    try:
        with stages.measure("load"):
            backbones = {name: load_backbone(config, name, runtime, batch_size) for name in config.backbones}
            batch_size = min(batch_size, max(backbone.largest_batch for backbone in backbones.values()))
            placement = choose_placement(config, runtime, batch_size, arguments.memory_limit)
    except MemoryError as error:
        raise ConfigError(
            f"too little memory to start ({error}); try --batch-size 1 or a smaller --image-size"
        ) from None
    options = Options(batch_size, arguments.workers or available_cores(), arguments.strict)
    try:
        check_memory(categories, config, backbones, placement)
    except (MemoryError, ValueError) as error:  # too little memory, or a precision that this installation lacks
        raise ConfigError(str(error)) from None
    log.info(
        "%d images in %d %s, preset %s, %s (%s)",
        sum(len(category.images) for category in categories),
        len(categories),
        "categories" if len(categories) > 1 else "category",
        config.preset,
        runtime.describe(),
        runtime.reason,
    )

    records = [
        _run_category(category, config, backbones, placement, options, stages, arguments, interrupts)
        for category in categories
    ]
    failures = sum(len(record["failures"]) for record in records)
    finished = [record for record in records if record["images"]]
    evaluation = _evaluate(arguments, data, categories, finished, stages)
    seconds = time.perf_counter() - start
    run: dict[str, Any] = {
        "version": importlib.metadata.version("zsad"),
        "preset": config.preset,
        "device": runtime.device_name,
        "runtime": runtime.describe(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "images": sum(len(record["images"]) for record in records),
        "failed": failures,
        "images_per_second": round(
            sum(len(record["images"]) for record in records if not record["resumed"]) / seconds, 3
        ),
        "peak_memory_bytes": peak_memory(),
        "device_memory_bytes": runtime.device.used_bytes() if runtime.device else None,
        "stages": {name: round(value, 3) for name, value in stages.seconds.items()},
        "library_share": round(sum(stages.seconds.get(stage, 0.0) for stage in LIBRARY_STAGES) / seconds, 4),
        "config": config.as_dict(),
        "checkpoints": [{"name": b.checkpoint, "sha256": b.sha256} for b in backbones.values()],
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "categories": {
            record["name"]: {
                "images": len(record["images"]),
                "failures": record["failures"],
                "groups": record["groups"],
                "group_size": config.group_size,
                "scale": record["scale"],
                "threshold": record["threshold"],
                "seconds": record["seconds"],
                "resumed": record["resumed"],
            }
            for record in records
        },
        "metrics": evaluation,
        "notes": _notes(records),
    }
    if "zsad" in arguments.format:
        shown = shown_categories(output, config.group_size, categories, records, evaluation)
        write_report(output / "report.html", run, shown)
    with written_whole(output / "run.json") as temporary:
        temporary.write_text(json.dumps(run, indent=1))
    share = f" ({100 * run['library_share']:.0f} % inside BLAS and ONNX Runtime)" if not runtime.devices else ""
    log.debug("time per stage%s:\n%s", share, stages.table(seconds))
    if arguments.json:
        _emit(json.dumps(run))
    elif not arguments.quiet:
        _emit(_summary(output, records, evaluation, arguments))
    return SOME_FAILED if failures else DONE


def _run_category(
    category: Category,
    config: Config,
    backbones: Mapping[str, Backbone],
    placement: Placement,
    options: Options,
    stages: Stages,
    arguments: argparse.Namespace,
    interrupts: _Interrupts,
) -> dict[str, Any]:
    """Score and write one category, or take over what an earlier run finished; a failure is recorded, not raised."""
    interrupts.check()
    name = printable(category.name)
    unreadable = [(str(path), reason) for path, reason in category.unreadable]
    if unreadable and options.strict:
        raise ImageError(": ".join((str(category.root / unreadable[0][0]), unreadable[0][1])))
    if category.ignored:
        log.info("%s: %d files are no images by their names and are ignored", name, len(category.ignored))
    for path in category.ignored:
        log.debug("%s: ignored", printable(str(path)))
    digest = fingerprint(category, config, {b.checkpoint: b.sha256 for b in backbones.values()}, arguments.format)
    record = finished_record(arguments.output, category, digest) if arguments.resume else None
    if record is not None:
        log.info("%s: already finished", name)
        return {**record, "resumed": True, "seconds": 0.0}
    start = time.perf_counter()
    try:
        with _Progress(name, arguments.quiet, interrupts) as progress:
            scored = score_category(category, config, backbones, placement, options, stages, progress)
        scored = replace(scored, failures=[*scored.failures, *unreadable])
        with stages.measure("write"):
            record = write_category(
                arguments.output, category, scored, config, arguments.format, digest, options.workers
            )
    except placement.fatal as error:
        raise OSError(f"the GPU failed ({error}); see nvidia-smi, or use --device cpu") from error
    except Exception as error:  # ONNX Runtime and OpenCV have errors of their own; the other categories go on
        if (isinstance(error, ImageError) and options.strict) or getattr(error, "errno", None) in NO_ROOM:
            raise
        log.error("%s: %s", name, error or type(error).__name__, exc_info=arguments.verbose)
        failures = [(str(image.relative), "its category failed") for image in category.images]
        if isinstance(error, TooFewImagesError):
            failures = error.failures
        record = {
            "name": category.name,
            "images": [],
            "failures": [{"path": path, "reason": reason} for path, reason in [*failures, *unreadable]],
            "groups": 0,
            "scale": None,
            "threshold": None,
        }
    for failure in record["failures"]:
        log.error("%s/%s: skipped: %s", name, printable(failure["path"]), failure["reason"])
    return {**record, "resumed": False, "seconds": round(time.perf_counter() - start, 3)}


class _Progress:
    """One bar per stage on standard error, where that is a terminal."""

    def __init__(self, category: str, quiet: bool, interrupts: _Interrupts) -> None:
        self.interrupts = interrupts
        self.category, self.disabled = category, quiet or not sys.stderr.isatty()
        self.bar: tqdm | None = None
        self.stage = ""

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.interrupts.check()
        if self.disabled:
            return
        if self.bar is None or stage != self.stage:
            if self.bar is not None:
                self.bar.close()
            self.stage = stage
            unit = "image" if stage == "backbone" else "pair"
            self.bar = tqdm(total=total, desc=f"{self.category}: {stage}", unit=unit, file=sys.stderr, leave=False)
        self.bar.update(done - self.bar.n)


def _evaluate(
    arguments: argparse.Namespace,
    data: Path,
    categories: Sequence[Category],
    finished: Sequence[Mapping[str, Any]],
    stages: Stages,
) -> Evaluation | None:
    """Compare with ground truth where the data have it; scoring never sees it."""
    labelled = any(ground_truth(c.root, image.relative)[0] for c in categories for image in c.images)
    if not (labelled and finished):
        return None
    # Without maps every image would be named for lacking one.
    level = logging.WARNING if "zsad" in arguments.format else logging.DEBUG
    with stages.measure("evaluate"):
        try:
            # A category that failed in this run may still have the results of an earlier one.
            return evaluate(
                arguments.output,
                data,
                warn=lambda message: log.log(level, "%s", printable(message)),
                only={record["name"] for record in finished},
            )
        except Exception as error:  # a mask that breaks its reader must not cost the report
            log.warning("no metrics: %s", error)
            return None


def _notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    for record in records:
        if 0 < len(record["images"]) < 10:
            notes.append(
                f"{record['name']}: only {len(record['images'])} images. With so few it is hard to tell what is usual "
                "from what is not; read the ranking with care."
            )
        if record["groups"] > 1:
            notes.append(f"{record['name']}: scored in {record['groups']} random groups, each against itself only.")
    notes.append("Scores are relative to this batch: 1 is its most unusual image or patch, not proof of a defect.")
    return notes


def _summary(
    output: Path,
    records: Sequence[Mapping[str, Any]],
    evaluation: Evaluation | None,
    arguments: argparse.Namespace,
) -> str:
    lines = []
    for record in records:
        name, failed = printable(record["name"]), len(record["failures"])
        lines.append(f"{name}: {len(record['images'])} images scored, {failed} failed")
        for image in sorted(record["images"], key=lambda image: int(image["rank"]))[:5]:
            lines.append(f"  {image['score']:.3f}  {printable(image['path'])}")
    if evaluation is not None:
        lines.append(printable(format_table(evaluation, 0.3), keep="\n").rstrip("\n"))
    return "\n".join([*lines, str(output / ("report.html" if "zsad" in arguments.format else "run.json"))])
