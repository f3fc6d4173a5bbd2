"""What `zsad-infer --bank` does to a bank: learn from what users say of images, tell what was done, take it back."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `--help` waits for nothing that works on images
    from zsad.engine.config import Config
    from zsad.engine.feedback_pass import Feedback
    from zsad.engine.methods.bank_file import Step
    from zsad.engine.networks.runtime import Runtime
    from zsad.engine.workplace import Options

    from .start import Interrupts

OPTIONS = ("accept", "reject", "masks", "bank_log", "undo")
LAST = -1  # --undo without a number


def add_feedback(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("feedback: what a bank learns from images that it was wrong about").add_argument
    add("--accept", type=Path, nargs="+", metavar="FILE", help="false alarms, or folders of such: normal from now on")
    add("--reject", type=Path, nargs="+", metavar="FILE", help="missed defects: what looks like them scores higher")
    add("--masks", type=Path, nargs="+", metavar="FILE", help="of rejected images, or a folder: where the defects are")
    add("--bank-log", action="store_true", default=None, help="list what a bank was told, step by step")
    add("--undo", type=int, nargs="?", const=LAST, metavar="N", help="take back step N of the log, or the last one")


def check_feedback(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> bool:
    """Tell whether a command is about feedback alone; what does not go together ends it."""
    given = [name for name in OPTIONS if getattr(arguments, name) is not None]
    if not given:
        return False
    said = f"--{given[0].replace('_', '-')}"
    if given == ["masks"] or (arguments.masks and not arguments.reject):
        parser.error("--masks says where the defects of --reject FILES are; give these too")
    if arguments.bank is None:
        parser.error(f"{said} is of a bank; give --bank part.zsad too")
    alone = [name for name in ("bank_log", "undo") if name in given]
    if alone and len(given) > 1:
        parser.error(f"--{alone[0].replace('_', '-')} goes with no other of {', '.join(map(_option, OPTIONS))}")
    if arguments.undo is not None and arguments.undo != LAST and arguments.undo < 1:
        parser.error(f"--undo takes the number of a step, from 1, not {arguments.undo}")
    for name in ("data", "demo", "watch", "save_bank", "reference", "shots", "fail_on", "resume", "threshold"):
        if getattr(arguments, name):
            option = arguments.data if name == "data" else _option(name)
            parser.error(f"{said} changes or lists a bank and scores nothing; leave out {option}")
    return True


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run_feedback(
    arguments: argparse.Namespace,
    config: "Config",
    runtime: "Runtime",
    options: "Options",
    interrupts: "Interrupts",
) -> int:
    """Do what there is to do with a bank, print it and return the exit code."""
    from zsad.engine.feedback_pass import give_back, take_back
    from zsad.engine.methods.bank import BankMethod
    from zsad.kernels.files import printable

    from .console import DONE, SOME_FAILED, ProgressBars, emit

    path = Path(arguments.bank)
    if arguments.bank_log:
        emit(_log(path, arguments.json))
        return DONE
    assert isinstance(config.settings, BankMethod.Settings)
    if arguments.undo is not None:
        done = take_back(path, None if arguments.undo == LAST else arguments.undo, config.settings.false_alarms)
    else:
        files = {kind: given for kind in ("accept", "reject") if (given := getattr(arguments, kind))}
        with ProgressBars(arguments.quiet, interrupts) as progress:
            done = give_back(path, files, arguments.masks or (), config, runtime, options, progress)  # type: ignore[arg-type]
    if arguments.json:
        emit(json.dumps(_record(done), indent=1))
    elif not arguments.quiet:
        emit(printable(_said(done), keep="\n"))
    return SOME_FAILED if done.failures else DONE


def _record(done: "Feedback") -> dict[str, Any]:
    steps = {name: [step.model_dump(mode="json") for step in getattr(done, name)] for name in ("added", "removed")}
    return {
        "bank": done.bank,
        **steps,
        "threshold": asdict(done.threshold),
        "failures": [asdict(failure) for failure in done.failures],
    }


def _said(done: "Feedback") -> str:
    lines = [line for step in done.added for line in _step(step)]
    lines += [line for step in done.removed for line in ("taken back:", *_step(step))]
    bound = done.threshold
    change = f"{bound.before:.3f} → {bound.after:.3f}" if lines else f"{bound.after:.3f}, as before"
    return "\n".join([*lines, f"{done.bank}: rejected above {change}: {bound.rule}"])


def _step(step: "Step") -> list[str]:
    """Describe a step in a line, and each of its images in another one."""
    from zsad.engine.feedback_pass import VERB

    lines = [f"step {step.number}, {step.when:%Y-%m-%d %H:%M:%S} UTC: {len(step.images)} {VERB[step.kind]}"]
    for image in step.images:
        patches = sum(image.patches.values())
        kept = f"{patches} {'patch' if patches == 1 else 'patches'} of it kept"
        scores = f"score {image.before:.3f} → {image.after:.3f}"
        lines.append(f"  {image.name} (sha256 {image.sha256[:12]}…): {scores}, {kept}")
    return lines


def _log(path: Path, as_json: bool) -> str:
    """Return what a bank was told; raises BankError."""
    from zsad.engine.feedback_pass import refuse_folder
    from zsad.engine.methods.bank_file import read_header
    from zsad.kernels.files import printable

    refuse_folder(path)
    header, _ = read_header(path)
    if as_json:
        steps = [step.model_dump(mode="json") for step in header.feedback]
        return json.dumps({"bank": str(path), "images": header.images, "room": header.room, "steps": steps}, indent=1)
    told = [line for step in header.feedback for line in _step(step)] or ["nothing was accepted or rejected"]
    return printable("\n".join([f"{path}: made from {header.images} images", *told]), keep="\n")
