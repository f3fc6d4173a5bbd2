"""`zsad-export`: checkpoints to ONNX."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .checkpoints import read_manifest
from .onnx_export import ExportOptions, export_onnx
from .state_dict import CheckpointError
from .vit_graph import ACTIVATIONS


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zsad-export`; 0 done, 2 usage or configuration."""
    parser = argparse.ArgumentParser(prog="zsad-export", description="Export vision transformer checkpoints to ONNX.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="list the checkpoints of the manifest and exit")
    what.add_argument("--checkpoint", metavar="NAME|FILE", help="a name of the manifest or a checkpoint file")
    parser.add_argument("--taps", metavar="5,11,...", help="blocks to tap, 0-based")
    parser.add_argument("--image-size", type=int, default=518, metavar="PIXELS", help="(default: %(default)s)")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="gelu", help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, help="attention heads (default: width / 64)")
    parser.add_argument("--no-embedding", action="store_true", help="leave out the image embedding and unused blocks")
    parser.add_argument("--output", type=Path, metavar="FILE.onnx", help="(default: a file in the user's cache)")
    arguments = parser.parse_args(argv)

    if arguments.list:
        for checkpoint in read_manifest().values():
            print(f"{checkpoint.name}  ({checkpoint.architecture}, {checkpoint.licence})")
            for source in checkpoint.sources:
                print(f"    {source.location}")
        return 0
    if arguments.taps is None:
        parser.error("--taps is needed with --checkpoint, for example --taps 5,11,17,23")
    try:
        taps = tuple(int(tap) for tap in arguments.taps.split(","))
    except ValueError:
        parser.error(f"--taps must be numbers separated by commas, not {arguments.taps!r}")
    options = ExportOptions(
        taps, arguments.image_size, arguments.activation, arguments.heads, embedding=not arguments.no_embedding
    )
    try:
        model = export_onnx(arguments.checkpoint, options, arguments.output)
    except (CheckpointError, OSError) as error:
        print(f"zsad-export: {error}", file=sys.stderr)
        return 2
    if not model.built:
        print("zsad-export: already built", file=sys.stderr)
    print(model.path)
    return 0
