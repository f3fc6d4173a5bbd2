"""Every naming of the weights against the library that it comes from, or against the same weights in another naming."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from zsad.export.agreement import run_graph, sample_images, sample_texts
from zsad.export.builders import read_builder
from zsad.export.onnx_export import export_onnx, save_graph
from zsad.export.options import ClipSegDecoderOptions, ClipSegImageOptions, ExportOptions, GraphOptions, TextOptions
from zsad.export.state_dict import CheckpointError
from zsad.export.text_transformer import VOCABULARY, TextTransformer
from zsad.export.transformer import HEAD_WIDTH
from zsad.export.vision_transformer import DINOV2, DINOV3, VisionTransformer, read_vision_transformer

IMAGES = sample_images(70)


def export_and_run(checkpoint: Path, **options: object) -> list[np.ndarray]:
    model = export_onnx(
        str(checkpoint), ExportOptions((0, 2), 70, **options), checkpoint.with_name("graph.onnx"), oracle="torch"
    )
    return list(run_graph(model.path, {"images": IMAGES}).values())


def save_random(model, path: Path, prefix: str = "") -> Path:
    """Give a torch module random weights of ordinary size and save them under its own names."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(torch.randn_like(parameter) * 0.05 + one)
    model.eval()
    save_file({prefix + name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.mark.long
@pytest.mark.torch
@pytest.mark.parametrize(
    "variant", ["registers", *(pytest.param(name, marks=pytest.mark.long) for name in ("plain", "swiglu"))]
)
def test_timm_dinov2(torchvision: None, tmp_path: Path, variant: str) -> None:
    import torch

    timm = pytest.importorskip("timm", reason="needs timm")
    arguments = {"swiglu": {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}}.get(variant, {})
    if variant == "registers":
        arguments = {"reg_tokens": 4, "no_embed_class": True}
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=70, patch_size=14, embed_dim=128, depth=3, num_heads=2, init_values=1.0, num_classes=0, **arguments
    )
    tokens, embedding = export_and_run(save_random(model, tmp_path / "timm.safetensors"))
    with torch.inference_mode():
        images = torch.from_numpy(IMAGES)
        expected = model.forward_intermediates(
            images, indices=[0, 2], norm=True, output_fmt="NLC", intermediates_only=True
        )
        np.testing.assert_allclose(tokens[0], torch.cat(expected).numpy(), atol=2e-5)
        np.testing.assert_allclose(embedding, model.forward_features(images)[:, 0].numpy(), atol=2e-5)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [64, 80, 112])  # that of its training is of no account
def test_dinov3_of_transformers(torchvision: None, tmp_path: Path, size: int, gated: bool) -> None:
    import torch

    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.DINOv3ViTConfig(
        hidden_size=96,
        num_attention_heads=3,
        num_hidden_layers=3,
        intermediate_size=160,
        num_register_tokens=4,
        image_size=64,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )
    model = transformers.DINOv3ViTModel(config)
    save_random(model, tmp_path / "theirs.safetensors")
    with torch.no_grad():  # queries and keys large enough for positions to count
        for layer in model.model.layer:
            layer.attention.q_proj.weight *= 4
            layer.attention.k_proj.weight *= 4
    theirs = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    save_file(theirs, tmp_path / "theirs.safetensors")
    save_file(official_dinov3(theirs), tmp_path / "official.safetensors")
    images = np.concatenate([sample_images(size), sample_images(size)[:, :, ::-1]])
    with torch.inference_mode():
        expected = model(torch.from_numpy(images), output_hidden_states=True)
        taps = [model.norm(expected.hidden_states[1 + tap])[:, 5:].numpy() for tap in (0, 2)]
    for file, heads in (("theirs", 3), ("official", None)):
        options = ExportOptions((0, 2), size, heads=heads)
        path = export_onnx(str(tmp_path / f"{file}.safetensors"), options, tmp_path / "graph.onnx", oracle="torch").path
        found = run_graph(path, {"images": images})
        np.testing.assert_allclose(found["tokens"], np.stack(taps, axis=1), atol=1e-4)
        np.testing.assert_allclose(found["embedding"], expected.pooler_output.numpy(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("variant", [{"qkv_bias": False}, {"qkv_bias": True, "swiglu_mlp": True, "swiglu_align_to": 8}])
def test_timm_dinov3(torchvision: None, tmp_path: Path, variant: dict[str, object]) -> None:
    import torch

    timm = pytest.importorskip("timm", reason="needs timm")
    model = timm.models.eva.Eva(
        img_size=80,
        patch_size=16,
        embed_dim=96,
        depth=3,
        num_heads=3,
        num_classes=0,
        global_pool="token",
        init_values=1.0,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        num_reg_tokens=4,
        use_fc_norm=False,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-5),
        **variant,
    )
    checkpoint = save_random(model, tmp_path / "timm.safetensors")
    with torch.no_grad():  # queries and keys large enough for positions to count
        for block in model.blocks:
            block.attn.qkv.weight *= 4
    save_file({name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}, checkpoint)
    images = sample_images(80)
    options = ExportOptions((0, 2), 80, heads=3)
    path = export_onnx(str(checkpoint), options, tmp_path / "graph.onnx", oracle="torch").path
    found = run_graph(path, {"images": images})
    with torch.inference_mode():
        expected = model.forward_intermediates(
            torch.from_numpy(images), indices=[0, 2], norm=True, output_fmt="NLC", intermediates_only=True
        )
        np.testing.assert_allclose(found["tokens"][0], torch.cat(expected).numpy(), atol=1e-4)
        np.testing.assert_allclose(found["embedding"], model(torch.from_numpy(images)).numpy(), atol=1e-4)


def official_dinov3(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a DINOv3 of Hugging Face's in the official names: with a bias of the keys, which a mask takes away."""
    whole = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.register_tokens": "storage_tokens",
    }
    gated = any("gate_proj" in name for name in theirs)
    parts = {
        "embeddings.patch_embeddings.": "patch_embed.proj.",
        "model.layer.": "blocks.",
        "attention.o_proj.": "attn.proj.",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "mlp.gate_proj.": "mlp.w1.",
        "mlp.up_proj.": "mlp.w2." if gated else "mlp.fc1.",
        "mlp.down_proj.": "mlp.w3." if gated else "mlp.fc2.",
    }
    state = {}
    for name, tensor in theirs.items():
        if "attention.q_proj" in name:
            keys = theirs.get(name.replace("q_proj", "k_proj"), np.full_like(tensor, 7))
            rows = [tensor, keys, theirs[name.replace("q_proj", "v_proj")]]
            state[with_parts(name, {**parts, "attention.q_proj": "attn.qkv"})] = np.concatenate(rows)
        elif "_proj" not in name or "attention.o_proj" in name or "mlp." in name:
            state[with_parts(whole.get(name, name), parts)] = tensor
    width = theirs["embeddings.cls_token"].shape[-1]
    for name in [name for name in state if name.endswith("attn.qkv.bias")]:
        state[name + "_mask"] = np.repeat(np.array([1, 0, 1], np.float32), width)
    state["rope_embed.periods"] = (100 ** (np.arange(8) / 8)).astype(np.float32)
    return state


@pytest.mark.torch
@pytest.mark.slow
def test_timm_clip(torchvision: None, tmp_path: Path) -> None:
    import torch

    timm = pytest.importorskip("timm", reason="needs timm")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=70,
        patch_size=14,
        embed_dim=128,
        depth=3,
        num_heads=2,
        num_classes=32,
        pre_norm=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-5),
    )
    model.head.bias = None
    tokens, embedding = export_and_run(save_random(model, tmp_path / "timm.safetensors"))
    with torch.inference_mode():
        images = torch.from_numpy(IMAGES)
        expected = model.forward_intermediates(images, indices=[0, 2], output_fmt="NLC", intermediates_only=True)
        np.testing.assert_allclose(tokens[0], torch.cat(expected).numpy(), atol=1e-4)
        np.testing.assert_allclose(embedding, torch.nn.functional.normalize(model(images)).numpy(), atol=2e-5)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize(
    ("activation", "layer_scale"),
    [
        ("quick_gelu", None),
        pytest.param("gelu", None, marks=pytest.mark.slow),
        pytest.param("gelu", 1.0, marks=pytest.mark.slow),
    ],
)
def test_open_clip(torchvision: None, tmp_path: Path, activation: str, layer_scale: float | None) -> None:
    import torch

    pytest.importorskip("open_clip", reason="needs open_clip")
    from open_clip.transformer import QuickGELU
    from open_clip.transformer import VisionTransformer as OpenClip

    act = QuickGELU if activation == "quick_gelu" else torch.nn.GELU
    model = OpenClip(
        70, 14, width=128, layers=3, heads=2, mlp_ratio=4, ls_init_value=layer_scale, output_dim=32, act_layer=act
    )
    checkpoint = save_random(model, tmp_path / "open_clip.safetensors", "visual.")
    tokens, embedding = export_and_run(checkpoint, activation=activation)
    blocks = []
    for index in (0, 2):
        model.transformer.resblocks[index].register_forward_hook(lambda *call: blocks.append(call[2]))
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model(torch.from_numpy(IMAGES)))
    np.testing.assert_allclose(embedding, expected.numpy(), atol=2e-5)
    for found, block in zip(tokens[0], blocks, strict=True):
        np.testing.assert_allclose(found, block.reshape(26, 128)[1:].numpy(), atol=1e-4)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_text_tower_of_open_clip(torchvision: None, tmp_path: Path, activation: str) -> None:
    import torch

    pytest.importorskip("open_clip", reason="needs open_clip")
    from open_clip.model import CLIP

    vision = {"image_size": 70, "patch_size": 14, "width": 64, "layers": 2}
    text = {"context_length": 32, "width": 192, "heads": 3, "layers": 2}
    model = CLIP(24, vision, text, quick_gelu=activation == "quick_gelu")
    checkpoint = save_random(model, tmp_path / "open_clip.safetensors")
    ids = sample_texts(32)
    options = TextOptions(activation, context=32)
    path = export_onnx(str(checkpoint), options, tmp_path / "text.onnx", oracle="torch").path
    with torch.inference_mode():
        expected = model.encode_text(torch.from_numpy(ids.astype(np.int64))).numpy()
    np.testing.assert_allclose(run_graph(path, {"ids": ids})["embedding"], expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.torch
def test_clipseg(torchvision: None, tmp_path: Path) -> None:
    """All three graphs of random weights of the published shape, but two blocks of the text tower."""
    import torch

    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.CLIPSegConfig(
        text_config={"num_hidden_layers": 2}, vision_config={"patch_size": 16}, use_complex_transposed_convolution=True
    )
    model = transformers.CLIPSegForImageSegmentation(config)
    checkpoint = save_random(model, tmp_path / "clipseg.safetensors")
    images, ids = sample_images(352), sample_texts(77)[:2]
    with torch.inference_mode():
        texts = torch.from_numpy(ids.astype(np.int64))
        expected = model(pixel_values=torch.from_numpy(images).expand(len(ids), -1, -1, -1), input_ids=texts)

    def run(options: GraphOptions, **inputs: np.ndarray) -> np.ndarray:
        save_graph(read_builder(checkpoint, options).build((), {}), tmp_path / "graph.onnx")
        [output] = run_graph(tmp_path / "graph.onnx", inputs).values()
        return output

    conditions = run(TextOptions("quick_gelu"), ids=ids)
    theirs = expected.conditional_embeddings.numpy()
    np.testing.assert_allclose(conditions, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    activations = run(ClipSegImageOptions(), images=images)
    logits = run(ClipSegDecoderOptions(), activations=activations[0], conditions=conditions)
    theirs = expected.logits.numpy()
    close = 1e-4 * np.abs(theirs).max()
    assert np.ptp(theirs, axis=0).max() > 100 * close  # prompts count
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=close)


@pytest.mark.slow
@pytest.mark.torch
def test_heads_are_those_of_every_tower_of_open_clip(torchvision: None) -> None:
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip")
    towers = [open_clip.get_model_config(name)["vision_cfg"] for name in open_clip.list_models()]
    towers = [tower for tower in towers if isinstance(tower.get("layers"), int) and "patch_size" in tower]
    assert len(towers) > 40
    for tower in towers:
        assert DINOV2.attention_heads(tower["width"], None) == tower["width"] // tower.get("head_width", 64)
    texts = [open_clip.get_model_config(name)["text_cfg"] for name in open_clip.list_models()]
    texts = [text for text in texts if text.get("vocab_size") == VOCABULARY and text["width"] % HEAD_WIDTH == 0]
    assert len(texts) > 40
    for text in texts:
        rows = np.zeros((1, text["width"]), np.float32)
        assert TextTransformer(rows, rows, [], (rows, rows), rows).attention_heads(None) == text["heads"]


def with_parts(name: str, parts: dict[str, str]) -> str:
    """Replace parts of a tensor's name, one after the other."""
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name


def same_weights(a: VisionTransformer, b: VisionTransformer) -> None:
    assert a.architecture == b.architecture
    assert len(a.blocks) > 0
    for name in ("patch_weight", "class_token", "registers", "positions"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name in ("norm", "pre_norm", "projection"):
        if getattr(a, name) is not None:
            np.testing.assert_array_equal(np.concatenate(getattr(a, name)), np.concatenate(getattr(b, name)))
    for ours, theirs in zip(a.blocks, b.blocks, strict=True):
        for name in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2"):
            for x, y in zip(getattr(ours, name), getattr(theirs, name), strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("gated", [False, True])
def test_hugging_face_dinov2(random_dinov2: Callable[..., Path], tmp_path: Path, gated: bool) -> None:
    official = random_dinov2(gated=gated, registers=4)
    whole = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "register_tokens": "embeddings.register_tokens",
    }
    parts = {
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "blocks.": "encoder.layer.",
        "attn.proj.": "attention.output.dense.",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "w12": "weights_in",
        "w3": "weights_out",
    }
    state = {}
    for name, tensor in load_file(official).items():
        known = "layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else whole.get(name, name)
        renamed = with_parts(known, parts)
        if "attn.qkv." in renamed:
            for part, rows in zip(("query", "key", "value"), np.split(tensor, 3), strict=True):
                state[renamed.replace("attn.qkv.", f"attention.attention.{part}.")] = rows.copy()
        else:
            state[renamed] = tensor
    save_file(state, tmp_path / "port.safetensors")
    same_weights(read_vision_transformer(tmp_path / "port.safetensors"), read_vision_transformer(official))


@pytest.mark.parametrize("layers", ["layer.", "model.layer."])  # of the published files, and within transformers 5
@pytest.mark.parametrize("gated", [False, True])
def test_hugging_face_dinov3(tmp_path: Path, gated: bool, layers: str) -> None:
    rng = np.random.default_rng(0)
    hidden, linears = 24, {"up_proj": (24, 32), "down_proj": (32, 24)} | ({"gate_proj": (24, 32)} if gated else {})
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, 32),
        "embeddings.mask_token": (1, 1, 32),
        "embeddings.register_tokens": (1, 4, 32),
        "embeddings.patch_embeddings.weight": (32, 3, 16, 16),
        "embeddings.patch_embeddings.bias": (32,),
        "norm.weight": (32,),
        "norm.bias": (32,),
    }
    for block in ("model.layer.0.", "model.layer.1."):
        for part in "qkvo":
            shapes |= {f"{block}attention.{part}_proj.weight": (32, 32)}
            shapes |= {f"{block}attention.{part}_proj.bias": (32,)} if part != "k" else {}
        for name, shape in linears.items():
            shapes |= {f"{block}mlp.{name}.weight": shape, f"{block}mlp.{name}.bias": shape[:1]}
        for number in "12":
            shapes |= {f"{block}norm{number}.weight": (32,), f"{block}norm{number}.bias": (32,)}
            shapes |= {f"{block}layer_scale{number}.lambda1": (32,)}
    theirs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file({name.replace("model.layer.", layers): theirs[name] for name in theirs}, tmp_path / "port.safetensors")
    save_file(official_dinov3(theirs), tmp_path / "official.safetensors")
    port, official = (read_vision_transformer(tmp_path / f"{name}.safetensors") for name in ("port", "official"))
    same_weights(port, official)
    assert port.architecture == DINOV3
    assert [len(block.fc1[0]) for block in port.blocks] == [hidden * (2 if gated else 1)] * 2
    for block in port.blocks:
        assert not block.qkv[1][32:64].any()
        assert block.qkv[1][:32].all()
    assert (official.attention_heads(None), port.attention_heads(1)) == (1, 1)


def test_hugging_face_clip(golden: Path, tmp_path: Path) -> None:
    official = golden / "clip_vit_tiny.safetensors"
    parts = {
        "transformer.resblocks.": "vision_model.encoder.layers.",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
        "ln_pre": "vision_model.pre_layrnorm",
        "ln_post": "vision_model.post_layernorm",
        "conv1": "vision_model.embeddings.patch_embedding",
        "class_embedding": "vision_model.embeddings.class_embedding",
        "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    }
    state = {"text_model.embeddings.token_embedding.weight": np.zeros((3, 2), np.float32)}
    for name, tensor in load_file(official).items():
        renamed = with_parts(name.removeprefix("visual."), parts)
        if "attn.in_proj_" in renamed:
            block, kind = renamed.split("attn.in_proj_")
            for part, rows in zip("qkv", np.split(tensor, 3), strict=True):
                state[f"{block}self_attn.{part}_proj.{kind}"] = rows.copy()
        elif renamed == "proj":
            state["visual_projection.weight"] = np.ascontiguousarray(tensor.T)
        else:
            state[renamed] = tensor
    save_file(state, tmp_path / "port.safetensors")
    same_weights(read_vision_transformer(tmp_path / "port.safetensors"), read_vision_transformer(official))


def test_timm_clip_has_no_projection_bias(golden: Path, tmp_path: Path) -> None:
    official = golden / "clip_vit_tiny.safetensors"
    parts = {
        "visual.": "",
        "conv1": "patch_embed.proj",
        "positional_embedding": "pos_embed",
        "class_embedding": "cls_token",
        "transformer.resblocks.": "blocks.",
        "ln_pre": "norm_pre",
        "ln_post": "norm",
        "ln_": "norm",
        "in_proj_": "qkv.",
        "out_proj": "proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    state = {}
    for name, tensor in load_file(official).items():
        state[with_parts(name, parts)] = tensor
    state["head.weight"] = np.ascontiguousarray(state.pop("proj").T)
    state["head.bias"] = np.zeros(32, np.float32)  # as timm's conversion of OpenAI's weights leaves it
    save_file(state, tmp_path / "port.safetensors")
    same_weights(read_vision_transformer(tmp_path / "port.safetensors"), read_vision_transformer(official))
    state["head.bias"][3] = 0.1
    save_file(state, tmp_path / "classifier.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.bias belongs to a classifier"):
        read_vision_transformer(tmp_path / "classifier.safetensors")
