"""Makes the arrays of tests/golden again: `python tests/support/make_golden.py` in an editable install.

Inputs are random; what is expected of them is computed here in plain float64 NumPy, from the definitions and without
the code under test (mutual scoring: by the float64 reference).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zsad.kernels import reference

Arrays = dict[str, NDArray]

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
GRID, DEGREES, INTERVAL = (6, 6), (1, 3, 5), (0.0, 0.3)
NEIGHBOURS = (1, 2, 3)
CLEAN_DEGREES = (1, 3)
INPUT_SIDE = 56
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
WIDTH, HEADS, BLOCKS, PATCH, SIDE = 32, 2, 2, 14, 5  # of the network
FINE_PATCH, REGISTERS, HIDDEN = 4, 2, 48  # of the network with rotary positions


def mutual_scoring() -> Arrays:
    """Tokens that share structure across images, their patch scores, and image scores rescored by RsCIN."""
    rng = np.random.default_rng(1)
    images, layers, patches, channels = 8, 2, GRID[0] * GRID[1], 24
    shared = rng.normal(size=(1, layers, patches, channels))
    own = rng.normal(size=(images, layers, patches, channels))
    tokens = ((shared + 0.7 * own) * np.exp(rng.normal(size=channels)) + 0.3).astype(np.float32)
    embeddings = rng.normal(size=(images, 16)) + 1
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = reference.mutual_scores(tokens, GRID, DEGREES, INTERVAL)
    top = np.sort(scores, axis=1)
    image_scores = (3 * top[:, -1] + top[:, -2]) / 4
    return {
        "tokens": tokens,
        "minima": reference.patch_minima(tokens, GRID, DEGREES).mean(axis=(0, 1)),
        "patch_scores": scores,
        "image_scores": image_scores,
        "embeddings": embeddings,
        "rescored": _rescored(image_scores, embeddings),
    }


def _rescored(scores: NDArray, embeddings: NDArray, neighbours: tuple[int, ...] = NEIGHBOURS) -> NDArray:
    """RsCIN (MuSc, section 3.3): weighted means of the most similar images' scores, averaged over their counts."""
    stretched = (scores - scores.min()) / (scores.max() - scores.min())
    similarity = embeddings @ embeddings.T
    results = []
    for k in neighbours:
        kept = similarity >= np.sort(similarity, axis=1)[:, [-k]]
        weights = np.where(kept, similarity, 0)
        results.append(weights @ stretched / weights.sum(axis=1))
    return np.mean(results, axis=0)


def clean_references() -> Arrays:
    """Tokens that share structure, in four images with a patch of their own, and their clean references, by sorting."""
    rng = np.random.default_rng(5)
    images, patches = 13, GRID[0] * GRID[1]
    tokens = rng.normal(size=(1, 2, patches, 16)) + 0.5 * rng.normal(size=(images, 2, patches, 16))
    tokens[9:, :, 7] = 2 * rng.normal(size=(2, 16)) + rng.normal(size=(4, 2, 16))
    tokens = tokens.astype(np.float32)
    minima = reference.patch_minima(tokens, GRID, CLEAN_DEGREES)  # [L, R, N, P, N]
    both = [minima.mean(axis=(0, 1)), minima[:, 0].mean(axis=0)]
    everyone = np.ones(images, bool)
    first_pass = patch_scores = _lowest(both[0], everyone, 1.0)
    for _ in range(3):
        order = np.argsort(_highest(patch_scores), kind="stable")
        kept = np.isin(np.arange(images), order[: round(0.5 * images)])
        patch_scores = _lowest(both[0], kept, 0.3)
    average, average_1 = (_lowest(array, everyone, 0.3) for array in both)
    clean_1 = _lowest(both[1], kept, 0.3)
    salient = patch_scores.argmax(axis=1)
    features = tokens.astype(float)[np.arange(images), :, salient]  # [N, L, C]
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    scores = _highest(average + 0.25 * (patch_scores - average))
    scores += (average_1 + 0.25 * (clean_1 - average_1)).max(axis=1)
    return {
        "tokens": tokens,
        "first_pass": first_pass,
        "kept": kept,
        "clean": patch_scores,
        "patch_maps": average_1 + 0.5 * (clean_1 - average_1),
        "image_scores": scores,
        "salient": salient,
        "rescored": _rescored(scores, features.reshape(images, -1) / np.sqrt(2), (1, 7)),
    }


def _lowest(minima: NDArray, kept: NDArray, share: float) -> NDArray:
    """Mean of the lowest share of every patch's distances to the images that are kept, without its own; [N, P]."""
    averages = []
    for image, distances in enumerate(minima):
        others = np.sort(distances[:, kept & (np.arange(len(kept)) != image)], axis=1)
        averages.append(others[:, : max(1, int(share * others.shape[1]))].mean(axis=1))
    return np.array(averages)


def _highest(patch_scores: NDArray) -> NDArray:
    """Mean of the highest 1 % of the patch scores [N, P], of at least one."""
    return np.sort(patch_scores, axis=1)[:, -max(1, round(0.01 * patch_scores.shape[1])) :].mean(axis=1)


def network_input() -> Arrays:
    """A picture and what a network is fed: antialiased bilinear and normalised."""
    rng = np.random.default_rng(2)
    height, width = 90, 123
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / a + phase) * np.cos(y / b) for a, b, phase in ((3, 5, 0), (7, 2, 1), (11, 13, 2))]
    picture = np.stack(waves, axis=-1) * 90 + 128 + rng.normal(scale=20, size=(height, width, 3))
    picture = picture.clip(0, 255).round().astype(np.uint8)
    rows, columns = _triangle(height, INPUT_SIDE), _triangle(width, INPUT_SIDE)
    resized = np.einsum("yh,hwc,xw->cyx", rows, picture.astype(float), columns) / 255
    mean, deviation = (np.array(values)[:, None, None] for values in (MEAN, DEVIATION))
    return {"picture": picture, "network_input": (resized - mean) / deviation}


def _triangle(source: int, target: int) -> NDArray:
    """Weights [target, source] of a bilinear resize whose triangles widen with the reduction."""
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(source) + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = np.maximum(1 - distance, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def metrics() -> Arrays:
    """Masks, maps and image scores with their metrics, by counting."""
    rng = np.random.default_rng(3)
    masks = np.zeros((6, 20, 24), np.uint8)
    masks[0, 2:7, 3:9] = masks[0, 12:15, 14:20] = masks[1, 8:18, 10:12] = masks[2, 0:4, 18:24] = 1
    maps = (rng.normal(size=masks.shape) + 1.5 * masks).round(2).astype(np.float32)  # with ties
    labels, scores = np.array([1, 1, 1, 0, 0, 0]), np.array([0.9, 0.4, 0.7, 0.5, 0.1, 0.4])
    return {
        "labels": labels,
        "scores": scores,
        "masks": masks,
        "maps": maps,
        "image_auroc_ap_f1": np.array(_classification(labels, scores)),
        "pixel_auroc_ap_f1": np.array(_classification(masks.ravel(), maps.ravel())),
    }


def _classification(labels: NDArray, scores: NDArray) -> tuple[float, float, float]:
    """AUROC by comparing every pair, AP and F1-max by trying every threshold."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    above = positive[:, None] > negative
    auroc = (above + 0.5 * (positive[:, None] == negative)).mean()
    average_precision, best, recall = 0.0, 0.0, 0.0
    for threshold in np.unique(scores)[::-1]:
        hits, called = (positive >= threshold).sum(), (scores >= threshold).sum()
        average_precision += (hits / len(positive) - recall) * hits / called
        recall = hits / len(positive)
        best = max(best, 2 * hits / (called + len(positive)))
    return float(auroc), float(average_precision), float(best)


def network() -> Arrays:
    """Weights of a tiny DINOv2 in its official names (`weights/…`), images, and the tokens of both of its blocks."""
    rng = np.random.default_rng(4)
    sizes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + SIDE**2, WIDTH), "norm.weight": (WIDTH,)}
    sizes |= {"norm.bias": (WIDTH,), "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH)}
    sizes["patch_embed.proj.bias"] = (WIDTH,)
    for block in range(BLOCKS):
        for name, rows, columns in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
        ):
            sizes |= {f"blocks.{block}.{name}.weight": (rows, columns), f"blocks.{block}.{name}.bias": (rows,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            sizes[f"blocks.{block}.{name}"] = (WIDTH,)
    state = _random_weights(rng, sizes, 0.15)
    images = rng.normal(size=(2, 3, PATCH * SIDE, PATCH * SIDE)).astype(np.float32)
    tokens = _forward({name: tensor.astype(float) for name, tensor in state.items()}, images.astype(float))
    return {**{f"weights/{name}": tensor for name, tensor in state.items()}, "images": images, "tokens": tokens}


def _random_weights(rng: np.random.Generator, sizes: dict[str, tuple[int, ...]], deviation: float) -> Arrays:
    around_one = ("norm.weight", "norm1.weight", "norm2.weight", "gamma")
    return {
        name: (deviation * rng.normal(size=size) + name.endswith(around_one)).astype(np.float32)
        for name, size in sizes.items()
    }


def _forward(w: dict[str, NDArray], images: NDArray) -> NDArray:
    """Patch tokens [B, L, P, C] of every block, after the final norm."""
    batch = len(images)
    patches = images.reshape(batch, 3, SIDE, PATCH, SIDE, PATCH).transpose(0, 2, 4, 1, 3, 5).reshape(batch, SIDE**2, -1)
    x = patches @ w["patch_embed.proj.weight"].reshape(WIDTH, -1).T + w["patch_embed.proj.bias"]
    x = np.concatenate([np.broadcast_to(w["cls_token"], (batch, 1, WIDTH)), x], axis=1) + w["pos_embed"]
    tapped = []
    for block in range(BLOCKS):
        b = {name.removeprefix(f"blocks.{block}."): tensor for name, tensor in w.items()}
        x = x + b["ls1.gamma"] * _attention(_norm(x, b, "norm1"), b)
        hidden = _norm(x, b, "norm2") @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
        x = x + b["ls2.gamma"] * (_gelu(hidden) @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"])
        tapped.append(_norm(x, w, "norm")[:, 1:])
    return np.stack(tapped, axis=1)


def rotary_network() -> Arrays:
    """Weights of a tiny DINOv3 in its official names, images, tokens of both blocks, and the class token's vector.

    Two registers, SwiGLU, and queries and keys large enough for positions to count.
    """
    rng = np.random.default_rng(5)
    sizes = {"cls_token": (1, 1, WIDTH), "storage_tokens": (1, REGISTERS, WIDTH), "mask_token": (1, WIDTH)}
    sizes |= {"patch_embed.proj.weight": (WIDTH, 3, FINE_PATCH, FINE_PATCH), "patch_embed.proj.bias": (WIDTH,)}
    sizes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    for block in range(BLOCKS):
        for name, rows, columns in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.w1", HIDDEN, WIDTH),
            ("mlp.w2", HIDDEN, WIDTH),
            ("mlp.w3", WIDTH, HIDDEN),
        ):
            sizes |= {f"blocks.{block}.{name}.weight": (rows, columns), f"blocks.{block}.{name}.bias": (rows,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            sizes[f"blocks.{block}.{name}"] = (WIDTH,)
    state = _random_weights(rng, sizes, 0.25)
    for block in range(BLOCKS):
        state[f"blocks.{block}.attn.qkv.bias_mask"] = np.repeat(np.array([1, 0, 1], np.float32), WIDTH)
    quarter = WIDTH // HEADS // 4
    state["rope_embed.periods"] = np.array([100 ** (index / quarter) for index in range(quarter)], np.float32)
    images = rng.normal(size=(2, 3, FINE_PATCH * SIDE, FINE_PATCH * SIDE)).astype(np.float32)
    w = {name: tensor.astype(float) for name, tensor in state.items()}
    tokens, embedding = _rotary_forward(w, images.astype(float))
    weights = {f"weights/{name}": tensor for name, tensor in state.items()}
    return {**weights, "images": images, "tokens": tokens, "embedding": embedding}


def _rotary_forward(w: dict[str, NDArray], images: NDArray) -> tuple[NDArray, NDArray]:
    """Patch tokens [B, L, P, C] of every block and the class token [B, C] of the last, after the final norm."""
    batch, front = len(images), 1 + REGISTERS
    cells = images.reshape(batch, 3, SIDE, FINE_PATCH, SIDE, FINE_PATCH).transpose(0, 2, 4, 1, 3, 5)
    patches = cells.reshape(batch, SIDE**2, -1) @ w["patch_embed.proj.weight"].reshape(WIDTH, -1).T
    rows = np.concatenate([w["cls_token"][0], w["storage_tokens"][0]])
    x = np.concatenate([np.broadcast_to(rows, (batch, front, WIDTH)), patches + w["patch_embed.proj.bias"]], axis=1)
    # Two real channels as one complex: turned by an angle is multiplied by a number of length 1.
    turns = np.ones((x.shape[1], WIDTH // HEADS // 2), complex)
    for patch in range(SIDE**2):
        for axis, cell in enumerate(divmod(patch, SIDE)):  # y, then x
            for index, period in enumerate(w["rope_embed.periods"]):
                angle = 2 * np.pi * (2 * (cell + 0.5) / SIDE - 1) / period
                turns[front + patch, axis * len(w["rope_embed.periods"]) + index] = np.exp(1j * angle)
    tapped = []
    for block in range(BLOCKS):
        b = {name.removeprefix(f"blocks.{block}."): tensor for name, tensor in w.items()}
        b["attn.qkv.bias"] = b["attn.qkv.bias"] * b["attn.qkv.bias_mask"]
        x = x + b["ls1.gamma"] * _attention(_norm(x, b, "norm1", 1e-5), b, turns)
        y = _norm(x, b, "norm2", 1e-5)
        gate, value = (y @ b[f"mlp.{name}.weight"].T + b[f"mlp.{name}.bias"] for name in ("w1", "w2"))
        hidden = gate / (1 + np.exp(-gate)) * value
        x = x + b["ls2.gamma"] * (hidden @ b["mlp.w3.weight"].T + b["mlp.w3.bias"])
        tapped.append(_norm(x, w, "norm", 1e-5))
    return np.stack([y[:, front:] for y in tapped], axis=1), tapped[-1][:, 0]


def _norm(x: NDArray, w: dict[str, NDArray], name: str, eps: float = 1e-6) -> NDArray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(x.var(axis=-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _attention(x: NDArray, b: dict[str, NDArray], turns: NDArray | None = None) -> NDArray:
    """turns: what the channel pairs of queries and keys are multiplied by, [T, width of a head / 2] complex."""
    batch, count, _ = x.shape
    qkv = (x @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]).reshape(batch, count, 3, HEADS, -1)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # [B, heads, tokens, width of a head] each
    if turns is not None:
        half = q.shape[-1] // 2
        paired = [(part[..., :half] + 1j * part[..., half:]) * turns for part in (q, k)]
        q, k = (np.concatenate([part.real, part.imag], axis=-1) for part in paired)
    weights = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(WIDTH / HEADS))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ v
    return mixed.transpose(0, 2, 1, 3).reshape(x.shape) @ b["attn.proj.weight"].T + b["attn.proj.bias"]


def _gelu(x: NDArray) -> NDArray:
    # The error function by Simpson's rule, since NumPy has none: erf(z) = 2/√π ∫ exp(-t²) dt from 0 to z.
    steps = np.linspace(0, 1, 201)
    simpson = np.where(np.arange(201) % 2, 4.0, 2.0)
    simpson[[0, -1]] = 1
    z = x / np.sqrt(2)
    integral = (np.exp(-np.square(z[..., None] * steps)) @ simpson) * z / 600
    return x * (1 + 2 / np.sqrt(np.pi) * integral) / 2


MAKERS: dict[str, Callable[[], Arrays]] = {
    maker.__name__: maker
    for maker in (mutual_scoring, clean_references, network_input, metrics, network, rotary_network)
}


if __name__ == "__main__":
    for name, make in MAKERS.items():
        np.savez_compressed(GOLDEN / f"{name}.npz", **make())
