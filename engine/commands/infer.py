"""`zsad-infer`: a folder of images in, anomaly scores, maps and a report out."""

import argparse
import heapq
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import file_limits, log_level
from .feedback import run_feedback
from .infer_arguments import parse, settings

if TYPE_CHECKING:  # `--help` waits for nothing that works on images
    from zsad.engine.config import Config
    from zsad.engine.networks.runtime import Runtime
    from zsad.engine.results.records import RunRecord
    from zsad.engine.run import Scorers
    from zsad.engine.workplace import Options, Saving

    from .start import Interrupts

log = logging.getLogger("zsad")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zsad-infer`; 0 done, 1 some inputs failed, 2 usage or configuration, 3 see --fail-on, 130 interrupted."""
    arguments = parse(argv)
    from .console import guarded

    return guarded(
        "zsad-infer",
        log_level(arguments),
        partial(_run, arguments),
        partial(_explain, arguments.output),
        partial(_go_on, arguments.output),
    )


def _go_on(output: Path) -> str:
    """Say how to go on if anything was finished: categories, groups, or images that need no others."""
    finished = any(path.name in ("category.json", "journal.jsonl", "groups.jsonl") for path in output.rglob("*.json*"))
    return f". What was finished is in {output}; add --resume to go on from there" if finished else ""


def _explain(output: Path, error: Exception) -> tuple[str, int] | None:
    """Say what stopped a run, with the exit code."""
    from zsad.engine.address_space import address_limit, is_scarcity, said_scarcity
    from zsad.engine.config import ConfigError
    from zsad.engine.images.folders import NothingToScoreError
    from zsad.engine.images.stored import ImageError
    from zsad.engine.results.output import OutputError
    from zsad.export.libraries import EngineError
    from zsad.export.state_dict import CheckpointError
    from zsad.kernels.files import printable
    from zsad.kernels.machine import CacheError

    from .console import SOME_FAILED, USAGE

    if isinstance(error, (ConfigError, CheckpointError, EngineError, CacheError, OutputError, NothingToScoreError)):
        return str(error), USAGE
    if isinstance(error, ImageError):
        return f"stopped by --strict: {printable(str(error))}{_go_on(output)}", SOME_FAILED
    if (limit := address_limit()) is not None and is_scarcity(error):
        return f"{said_scarcity(limit)}{_go_on(output)}", USAGE
    if isinstance(error, (OSError, MemoryError)):
        return f"stopped: {str(error).rstrip('.')}{_go_on(output)}", SOME_FAILED
    return None


def _run(arguments: argparse.Namespace, interrupts: "Interrupts") -> int:
    from zsad.engine.config import ConfigError, load_config
    from zsad.engine.images.limits import Limits
    from zsad.engine.methods.method import method_class
    from zsad.engine.networks.runtime import choose_runtime
    from zsad.engine.results.formats import of_finished, of_images
    from zsad.engine.results.output import claimed
    from zsad.engine.run import make_bank, run
    from zsad.engine.workplace import Options

    from .console import DONE, SOME_FAILED, ProgressBars, emit

    interrupts.check()  # it may have been put off until here
    # Where others score, they choose.
    runtime = choose_runtime(*(("cpu",) if arguments.ray is not None else (arguments.device, arguments.runtime)))
    preset, base = arguments.preset, None
    if arguments.bank is not None:
        from zsad.engine.methods.bank import bank_settings

        preset, base = bank_settings(Path(arguments.bank))
    config = load_config(preset, arguments.config, settings(arguments), method_of=method_class, base=base)
    if arguments.bank is not None and arguments.watch is None and config.expected_defects is not None:
        raise ConfigError(
            "--expected-defects: the bound of a bank follows from its own images, however many of the others have a "
            "defect; leave it out, or say with --false-alarms how many good ones may be rejected"
        )
    data = arguments.data
    if arguments.demo:
        from zsad.engine.demo import draw_demo
        from zsad.engine.images.tree import DEMO

        with claimed(arguments.output, (), arguments.resume):
            data = draw_demo(arguments.output / DEMO, config.seed).parent
    options = Options(
        output=arguments.output,
        formats=of_images(arguments.format),
        exports=of_finished(arguments.format),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        memory_limit=arguments.memory_limit,
        limits=Limits(**file_limits(arguments)),
        strict=arguments.strict,
        resume=arguments.resume,
        keep_stages=arguments.keep_stages,
        saving=_saving(arguments),
    )
    if arguments.feedback:
        return run_feedback(arguments, config, runtime, options, interrupts)
    if arguments.watch is not None:
        return _watch(arguments, config, runtime, options, interrupts)
    if data is None:
        with ProgressBars(arguments.quiet, interrupts) as progress:
            unreadable = make_bank(config, runtime, options, progress)
        return SOME_FAILED if unreadable else DONE
    with _scorers(arguments, config, options) as scorers, ProgressBars(arguments.quiet, interrupts) as progress:
        record = run(data, config, runtime, options, progress, scorers)
    share = f" ({100 * record.library_share:.0f} % in networks and products)" if not runtime.devices else ""
    log.debug("time per stage%s:\n%s", share, _stage_table(record))
    if arguments.json:
        emit(record.to_json())
    elif not arguments.quiet:
        emit(_summary(record, options))
    if record.failed or record.not_compared:
        return SOME_FAILED
    return DONE if arguments.fail_on is None else _judged(record, arguments.fail_on)


def _scorers(
    arguments: argparse.Namespace, config: "Config", options: "Options"
) -> "AbstractContextManager[Scorers | None, Any]":
    """Return who scores: workers on a cluster, or None for this process."""
    if arguments.ray is None:
        return nullcontext()
    from zsad.engine.cluster.team import Team

    return Team(arguments.ray, arguments.device, arguments.runtime, config, options)


def _watch(
    arguments: argparse.Namespace, config: "Config", runtime: "Runtime", options: "Options", interrupts: "Interrupts"
) -> int:
    """Score what arrives until Ctrl-C or SIGTERM, which is the usual end; what is in flight is finished first."""
    from zsad.engine.watch import Listener, Told, watch
    from zsad.kernels.files import printable

    from .console import DONE, emit

    def tell(told: Told) -> None:
        if arguments.json:
            emit(told.to_json())
        elif not arguments.quiet:
            emit(printable(str(told)))

    interrupts.waits = True
    watch(arguments.watch, config, runtime, options, Listener(lambda: not interrupts.seen, tell))
    return DONE


def _judged(record: "RunRecord", verdict: str) -> int:
    """Return the exit code of a run that fails on a verdict; what has none cannot pass either."""
    from zsad.engine.images.categories import counted
    from zsad.kernels.files import printable

    from .console import DONE, REJECTED, SOME_FAILED

    for category in record.categories:
        if category.bounds is None:
            log.error("--fail-on %s: %s has no verdicts; give --threshold a number", verdict, printable(category.name))
    if any(category.bounds is None for category in record.categories):
        return SOME_FAILED
    verdicts = [category.verdicts() for category in record.categories]
    rejected, review = (sum(counts[name] for counts in verdicts) for name in ("reject", "review"))
    failing = [f"{rejected} rejected"] + [f"{review} to be reviewed"] * (verdict == "review")
    if not rejected and (verdict == "reject" or not review):
        return DONE
    log.error("--fail-on %s: of %s %s", verdict, counted(record.images, "image"), ", ".join(failing))
    return REJECTED


def _saving(arguments: argparse.Namespace) -> "Saving | None":
    """Return where banks go and how they are made, None where none is asked for."""
    if arguments.save_bank is None:
        return None
    from zsad.engine.methods.bank_build import Making
    from zsad.engine.workplace import Saving

    names = {"size": "bank_size", "precision": "bank_precision", "neighbours": "neighbours"}
    given = {name: value for name, option in names.items() if (value := getattr(arguments, option)) is not None}
    return Saving(arguments.save_bank, Making(**given))


def _stage_table(record: "RunRecord") -> str:
    other = max(0.0, record.seconds - sum(record.stages.values()))
    rows = {**record.stages, "other": other, "total": record.seconds}
    return "\n".join(
        f"  {name:<16}{value:9.2f} s {100 * value / record.seconds:6.1f} %" for name, value in rows.items()
    )


def _summary(record: "RunRecord", options: "Options") -> str:
    from zsad.engine.images.categories import counted
    from zsad.kernels.files import printable

    lines = []
    for category in record.categories:
        name = printable(category.name)
        judged = [f"{count} {verdict}" for verdict, count in category.verdicts().items() if count]
        counts = [f"{counted(len(category.images), 'image')} scored", *judged, f"{len(category.failures)} failed"]
        lines.append(f"{name}: {', '.join(counts)}")
        for image in heapq.nsmallest(5, category.images, key=lambda image: image.rank):
            lines.append(f"  {image.score:.3f}  {printable(image.path)}")
    if record.metrics is not None:
        from zsad.engine.evaluation.evaluate import format_table

        lines.append(printable(format_table(record.metrics, 0.3), keep="\n").rstrip("\n"))
    results = ["report.html" if "zsad" in options.formats else "run.json", *options.exports]
    return "\n".join([*lines, *(printable(str(options.output / name)) for name in results)])
