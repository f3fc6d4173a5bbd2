"""Variance Vigilance Vanguard between the networks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zsad.engine.methods.vvv import LOWEST, counted_prompts, harmonic_mean
from zsad.engine.text.prompts import prompt_set
from zsad.engine.text.vectors import abnormal_probability, class_mean

Arrays = Mapping[str, NDArray[Any]]


def classes(arrays: Arrays) -> NDArray[np.float64]:
    return np.stack([class_mean(arrays[f"prompts_{label}"], True) for label in ("normal", "abnormal")])


def test_golden_scenes(vvv_host: Arrays, scene: Arrays) -> None:
    scores = abnormal_probability(scene["tile_image_embeddings"], classes(vvv_host), tau=0.07)
    np.testing.assert_allclose(scores, scene["tile_scores"], atol=1e-5)
    for logits, expected in zip(scene["tile_logits"], scene["tile_maps"], strict=True):
        np.testing.assert_allclose(harmonic_mean(logits), expected, atol=1e-5)


def test_golden_functions(vvv_host: Arrays) -> None:
    np.testing.assert_allclose(harmonic_mean(vvv_host["harmonic_logits"]), vvv_host["harmonic_mean"], atol=1e-5)
    for tau in (0.01, 0.07):
        found = abnormal_probability(vvv_host["score_image_embeddings"], classes(vvv_host), tau)
        np.testing.assert_allclose(found, vvv_host[f"score_tau_{tau}"], atol=1e-5)


def test_the_mean_of_the_prompts_gives_the_mean_of_their_cosines(vvv_host: Arrays) -> None:
    vectors = vvv_host["score_image_embeddings"].astype(np.float64)
    units = [
        prompts / np.linalg.norm(prompts, axis=1, keepdims=True)
        for prompts in (vvv_host["prompts_normal"].astype(np.float64), vvv_host["prompts_abnormal"])
    ]
    cosines = [(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) @ unit.T).mean(axis=1) for unit in units]
    expected = 1 / (1 + np.exp((cosines[0] - cosines[1]) / 0.07))
    np.testing.assert_allclose(abnormal_probability(vectors, classes(vvv_host), 0.07), expected, atol=1e-6)


def test_prompts_that_are_there_twice_run_once_and_count_twice() -> None:
    prompts, counts = counted_prompts(prompt_set("vvv").localising, deduplicate=False)
    assert len(prompts) == len(set(prompts)) == 18
    assert counts.sum() == 19
    assert dict(zip(prompts, counts, strict=True))["an error"] == 2
    np.testing.assert_array_equal(counted_prompts(prompt_set("vvv").localising, deduplicate=True)[1], np.ones(18))
    logits = np.random.default_rng(0).normal(size=(18, 3, 4)).astype(np.float32)
    twice = np.stack([logits[prompts.index(prompt)] for prompt in prompt_set("vvv").localising])
    np.testing.assert_allclose(harmonic_mean(logits, counts), harmonic_mean(twice), rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(prompts=st.integers(1, 25), scale=st.sampled_from([0.1, 10.0, 1000.0]), seed=st.integers(0, 2**32 - 1))
def test_harmonic_means_are_finite_and_below_arithmetic_ones(prompts: int, scale: float, seed: int) -> None:
    logits = (scale * np.random.default_rng(seed).normal(size=(prompts, 3, 5))).astype(np.float32)
    means = harmonic_mean(logits)
    exact = np.maximum(logits.astype(np.float64), LOWEST)
    np.testing.assert_allclose(means, prompts / (1 + np.exp(-exact)).sum(axis=0), rtol=1e-5)
    assert (means > 0).all()
    assert (means <= (1 / (1 + np.exp(-exact))).mean(axis=0) * (1 + 1e-5)).all()
