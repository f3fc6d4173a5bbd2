"""The options of `zsad-infer`, and which of them go together. Imports nothing that `--help` would wait for."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zsad.engine.presets.names import preset_names
from zsad.engine.results.formats import FORMATS, of_finished

from .arguments import Parser, Version, add_file_limits, add_loudness, location, numbers, size
from .feedback import OPTIONS, add_feedback, check_feedback

DEFAULT_PRESET = "small"

# Options that are no part of the configuration.
OF_THE_RUN = frozenset(
    [
        *OPTIONS,
        "feedback",
        "data",
        "demo",
        "output",
        "preset",
        "config",
        "device",
        "runtime",
        "ray",
        "batch_size",
        "workers",
        "memory_limit",
        "megapixels",
        "seconds",
        "format",
        "watch",
        "save_bank",
        "bank_size",
        "bank_precision",
        "neighbours",
        "resume",
        "strict",
        "fail_on",
        "keep_stages",
        "json",
        "verbose",
        "quiet",
    ]
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what cannot be done ends the process with exit code 2."""
    parser = Parser(
        prog="zsad-infer",
        description="Score a folder of unlabeled images: an anomaly score per image and a map per pixel, in [0, 1].",
        epilog="Exit codes: 0 done, 1 some inputs failed (each named on stderr), 2 usage or configuration, "
        "3 an image has the verdict that --fail-on names, 130 interrupted.",
    )
    _add_inputs(parser)
    _add_settings(parser)
    _add_banks(parser)
    add_feedback(parser)
    _add_results(parser)
    arguments = parser.parse_args(argv)
    only_saved = arguments.save_bank is not None and arguments.reference is not None
    arguments.feedback = check_feedback(parser, arguments)
    needs_none = arguments.feedback or only_saved or arguments.watch is not None
    _check_banks(parser, arguments)
    if arguments.data is None and not arguments.demo and not needs_none:
        if arguments.save_bank is not None:
            parser.error(
                "--save-bank keeps what looks normal: give known-good images with --reference GOOD/, and nothing is "
                "scored; or DATA, a folder to score, of which the half with the lowest scores is kept"
            )
        if arguments.ray is not None and Path(arguments.ray).is_dir():
            parser.error(f"--ray takes {arguments.ray} for an address; write the folder first: {arguments.ray} --ray")
        parser.error("give a folder of images, or --demo")
    _check_watch(parser, arguments)
    _check_ray(parser, arguments)
    if arguments.data is not None and arguments.demo:
        parser.error(f"--demo draws its own images; leave out {arguments.data} or --demo")
    for name in ("batch_size", "workers"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return arguments


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was given of the configuration, by the names of `Config` and of methods' settings."""
    return {name: value for name, value in vars(arguments).items() if name not in OF_THE_RUN and value is not None}


def _check_banks(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.bank is not None:
        if arguments.save_bank is not None:
            parser.error("--save-bank makes a bank and --bank scores by one; give one of them")
        if arguments.preset != DEFAULT_PRESET:
            parser.error(f"--bank says itself which preset it is of; leave out --preset {arguments.preset}")
    elif arguments.false_alarms is not None and arguments.reference is None and arguments.shots is None:
        parser.error(
            "--false-alarms is promised by what is known to be good; give --bank part.zsad or --reference GOOD/, or "
            "without these --expected-defects SHARE or --threshold SCORE"
        )
    if arguments.save_bank is None:
        for name in ("bank_size", "bank_precision", "neighbours"):
            if (value := getattr(arguments, name)) is not None:
                option = f"--{name.replace('_', '-')}"
                if arguments.bank is None:
                    parser.error(f"{option} decides how a bank is made; give --save-bank FILE too")
                parser.error(
                    f"{option} was decided when {arguments.bank} was made; leave it out, or make another bank: "
                    f"zsad-infer --reference GOOD/ --save-bank part.zsad {option} {value}"
                )
    for name, most in (("bank_size", None), ("neighbours", 16)):
        value = getattr(arguments, name)
        if value is not None and (value < 1 or (most is not None and value > most)):
            up_to = "at least 1" if most is None else f"from 1 to {most}"
            parser.error(f"--{name.replace('_', '-')} must be {up_to}, not {value}")


def _check_watch(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.watch is None:
        return
    if arguments.bank is None:
        parser.error(
            "--watch scores each image by itself, by a bank: make one with --reference GOOD/ --save-bank part.zsad, "
            "and give --bank part.zsad"
        )
    if exports := of_finished(arguments.format):
        parser.error(f"--format {exports[0]} is made once all images have a score, which never is with --watch")
    for name in ("data", "demo", "strict", "fail_on", "reference", "shots"):
        if getattr(arguments, name):
            option = f"the folder {arguments.data}" if name == "data" else f"--{name.replace('_', '-')}"
            parser.error(f"--watch scores what arrives in {arguments.watch} until it is ended; leave out {option}")


def _check_ray(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.ray is None:
        return
    if arguments.ray.startswith("ray://"):
        parser.error(
            f"--ray {arguments.ray}: a client of Ray from outside cannot score; run zsad-infer on a machine of the "
            "cluster, with --ray auto"
        )
    if arguments.device not in ("auto", "cpu"):
        parser.error(f"--ray gives each worker one GPU by itself; leave out --device {arguments.device}")
    for name in ("watch", "save_bank", "feedback"):
        if getattr(arguments, name):
            option = "what is told to a bank" if name == "feedback" else f"--{name.replace('_', '-')}"
            parser.error(f"--ray scores folders; {option} is for one machine, so leave out one of them")


def _add_banks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("banks: score each image alone, by what is known to look normal").add_argument
    add(
        "--save-bank",
        type=Path,
        metavar="part.zsad",
        help="keep what is normal: --reference's images, else the half that scores lowest; of several categories a "
        "folder. Without DATA nothing is scored",
    )
    add("--bank", metavar="part.zsad", help="score by a bank, or by those of a folder, called as the categories are")
    add(
        "--watch",
        type=Path,
        metavar="FOLDER",
        help="with --bank: score images as they arrive there, until Ctrl-C (exit code 0); a line for each, with --json "
        "as JSON. Started again, it goes on",
    )
    add("--false-alarms", type=float, metavar="0.01", help="share of good images that may be rejected")
    add("--bank-size", type=int, metavar="N", help="patches kept per tap and degree at most (default: 20000)")
    add("--bank-precision", choices=("fp16", "int8", "fp32"), help="in which they are kept (default: fp16)")
    add("--neighbours", type=int, metavar="K", help="of the bank, whose mean distance counts (default: 1)")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "data",
        nargs="?",
        type=location,
        help="folder of images, of such folders, in MVTec layout, or a list of files or URLs (.csv, .jsonl, .parquet)",
    )
    add("--demo", action="store_true", help="draw a small set of images with planted defects and score that")
    add("--output", type=Path, default=Path("out"), help="results folder (default: %(default)s)")
    add("--preset", default=DEFAULT_PRESET, choices=preset_names(), help="(default: %(default)s)")
    add("--config", type=Path, metavar="FILE.toml", help="values that replace the preset's")
    add("--device", default="auto", help="auto, cpu, cuda:N, cuda:N,M or cuda:all (default: %(default)s)")
    add(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="score on the machines of a Ray cluster, HOST:6379 or auto, one worker per GPU, or on a CPU per --workers "
        "processors; without ADDRESS a Ray of its own on this machine",
    )
    add("--runtime", default="auto", help="of networks: auto, native, onnxruntime, openvino, tensorrt, tensorrt-rtx")
    add("--decoder", help="pillow (the default), or nvimgcodec: JPEG files on the GPU, to slightly other pixels")
    add(
        "--bit-depth",
        type=int,
        metavar="BITS",
        help="bits in use in 16-bit files: 8 to 16 (default: what a category uses)",
    )
    add("--workers", type=int, metavar="N", help="threads that decode and write (default: one per core)")
    add("--batch-size", type=int, metavar="N", help="images per forward pass (default: 1 on a CPU, 8 on a GPU)")
    add(
        "--memory-limit",
        type=size,
        metavar="4GB",
        help="of what scores, above it tokens are spilled (default: 3/4 of the free memory, 9/10 on a GPU)",
    )
    add_file_limits(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--image-size",
        type=_image_size,
        metavar="PIXELS|auto",
        help="side of the networks' input, a multiple of the patch size; auto: as large as a category's images are",
    )
    add("--taps", type=numbers(int), metavar="5,8", help="blocks whose patch tokens are scored, 0-based")
    add("--degrees", type=numbers(int), metavar="1,3", help="neighbourhood sizes that patches are averaged over")
    add(
        "--interval",
        type=numbers(float),
        metavar="0,0.3",
        help="part of the sorted distances that is averaged: fractions up to 1 (all), or whole counts above",
    )
    add(
        "--references",
        metavar="blended",
        help="which images patches are compared with: all, those that look normal (clean), or both (blended)",
    )
    add(
        "--position-window",
        type=int,
        metavar="N",
        help="fixed cameras: compare patches only with those at most N rows and columns from their own place",
    )
    add("--precision", help="of the scoring: fp32 or int8 on a CPU, fp16 or int8 on a GPU; int8 only chooses winners")
    add(
        "--network-precision",
        "--backbone-precision",
        dest="network_precision",
        help="fp32, int8 or, with OpenVINO, bf16 on a CPU; fp16 or fp32 on a GPU",
    )
    add("--object", metavar="NAME", help="what the images show, in words (default: the name of their folder)")
    add("--prompts", metavar="SET|FILE.toml", help="states and templates of the words that images are compared with")
    add("--reference", metavar="FOLDER|LIST|IMAGE", help="known-good images, or a file with a path in each line")
    add("--shots", type=int, metavar="K", help="draw K known-good images, without --reference from the split train")
    add(
        "--foreground",
        metavar="isnet",
        help="what finds it: colour, isnet, isnet+sam or none; the background gets the lowest score",
    )
    add(
        "--components",
        action="store_true",
        default=None,
        help="look at each component of the foreground by itself, in tiles of the full resolution",
    )
    add("--tile", type=int, metavar="518", help="cut every image into tiles of this side, at its own resolution")
    add("--tiles", type=_tiles, metavar="4x3", help="cut every image into so many columns and rows of tiles instead")
    add("--overlap", type=int, metavar="PIXELS", help="of tiles, at least (default: an eighth of their side)")
    add("--scale", type=float, metavar="0.5", help="of images that --tile cuts (default: 1)")
    add(
        "--tile-batches",
        metavar="aligned",
        help="of presets that compare images: compare tiles of one place (aligned; the default where all images have "
        "one size), or all tiles of all images (pooled)",
    )
    add("--variant", help="of winclip: anomalib (the default), acc or paper")
    add("--group-size", type=int, metavar="N", help="score in random groups of N images: linear cost")
    add(
        "--threshold",
        type=_threshold,
        metavar="0.5|auto",
        help="accept up to this score, reject above; auto (the default): accept, review or reject by the scores",
    )
    add("--expected-defects", type=float, metavar="0.05", help="about which share of the images has a defect")
    add("--seed", type=int, help="for dealing the groups, choosing --shots and drawing the demo (default: 0)")


def _add_results(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--format",
        type=_formats,
        default=["zsad"],
        metavar="zsad,rayan,…",
        help="zsad: tables, TIFF maps, overlays, report; rayan: the challenge's JSON files; mvtec-ad2: a submission "
        "for MVTec AD 2's server; mvtec-ad, mvtec-loco, mvtec-3d, visa: a tree of TIFF maps as evaluators read it; "
        "coco: boxes and masks of defects. All but the first two bring zsad along (default: zsad)",
    )
    add("--resume", action="store_true", help="keep categories that an earlier run with these settings finished")
    add("--strict", action="store_true", help="stop at the first unreadable image")
    add(
        "--fail-on",
        choices=("reject", "review"),
        help="exit code 3 if an image is rejected, or even if one is to be reviewed",
    )
    add("--keep-stages", action="store_true", help="write foregrounds, masks and tiles as pictures")
    add(
        "--json",
        action="store_true",
        help="print the run record, or what feedback has changed, as JSON on standard output; with --watch a line for "
        "each image",
    )
    add_loudness(parser, "plans and the time per stage")
    add("--version", action=Version, nargs=0, help="print the version and exit")


def _formats(text: str) -> list[str]:
    chosen = text.split(",")
    if not set(chosen) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(FORMATS)}, not {text!r}")
    return chosen


def _image_size(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto or a number of pixels, not {text!r}") from None


def _tiles(text: str) -> tuple[int, ...]:
    try:
        columns, rows = text.lower().split("x")
        return int(columns), int(rows)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be columns and rows, 4x3 say, not {text!r}") from None


def _threshold(text: str) -> float | Any:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto or a number in [0, 1], not {text!r}") from None
