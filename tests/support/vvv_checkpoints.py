"""Variance Vigilance Vanguard on tiny networks: the golden ones, a foreground by brightness, their configuration."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from clip_checkpoints import write_clip
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from zsad.engine.text.tokenizer import CONTEXT

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "segmentation"
WORDS = 49408  # of CLIP's vocabulary

# Few enough for the text towers to take no time; one localising text is there twice.
FEW = """
normal = ["{}", "good {}", "{} without any marks"]
abnormal = ["broken {}", "{} with scratches"]
templates = ["{}", "a photo of a {}."]
localising = ["a defect", "a crack", "an error", "a dent", "a scratch", "a tear", "an error"]
"""


def write_clipseg(path: Path) -> Path:
    """Write the golden CLIPSeg with texts as long and as many words as CLIP has, for which its own are too few."""
    file = GOLDEN / "clipseg_tiny.safetensors"
    if not file.is_file():
        pytest.skip(f"needs {file}, which is not part of the repository")
    rng, state = np.random.default_rng(0), load_file(file)
    table = "clip.text_model.embeddings."
    state[table + "token_embedding.weight"] = rng.normal(0, 0.5, (WORDS, 32)).astype(np.float32)
    state[table + "position_embedding.weight"] = rng.normal(0, 0.3, (CONTEXT, 32)).astype(np.float32)
    save_file({name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}, path)
    return path


def write_bright_isnet(path: Path, size: int) -> Path:
    """Write a ready graph, as those of IS-Net are, that takes for the object what is brighter than half."""
    shapes = (("images", 3), ("foreground", 1))
    images, foreground = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, size, size]) for name, channels in shapes
    )
    weight = numpy_helper.from_array(np.full((1, 3, 1, 1), 20, np.float32), "weight")
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["foreground"]),
    ]
    graph = helper.make_graph(nodes, "bright", [images], [foreground], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def stages(
    isnet: Path,
    size: int,
    foreground: str = "",
    masks: str = "min_predicted_iou = 0.72\nmin_stability = 0.78",
    tiles: str = "",
) -> str:
    """Return the tables of IS-Net, at so many pixels, and of the golden SAM; the others: lines of their tables."""
    return f"""
[stages.isnet]
checkpoint = "{isnet}"
image_size = {size}
[stages.sam]
checkpoint = "{GOLDEN / "sam_tiny.safetensors"}"
image_size = 192
heads = 4
[stages.foreground]
{foreground}
[stages.masks]
points_per_side = 8
{masks}
[stages.tiles]
min_side = 32
{tiles}
"""


def networks(folder: Path) -> str:
    """Return the tables for CLIP and CLIPSeg, whose checkpoints are written into a folder."""
    return f"""
image_size = 96
[networks.clip]
checkpoint = "{write_clip(folder, "clip_tiny")}"
[networks.clipseg]
checkpoint = "{write_clipseg(folder / "clipseg.safetensors")}"
image_size = 96
heads = 3
text_heads = 2
"""
