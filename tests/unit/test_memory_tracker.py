# SPDX-License-Identifier: Apache-2.0
"""What the efficient tracker remembers and recalls: tokens, modes, the pooled attention's formula, gradients."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lively_trackers import GRID, LATENTS, efficient, lively_tracker, options, random_steps, run_steps, trained
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import get_1d_sine_pe

from effsam3.models.chassis.tiny import WIDTH
from effsam3.models.memory.attention import memory_tokens
from effsam3.models.memory.config import MODES, EfficientTrackerConfig, MemoryConfigError
from effsam3.models.memory.slot import tracker_config
from effsam3.models.memory.tracker import EfficientTracker
from effsam3.models.registry import SAM3S
from effsam3.recipe.reader import load_recipe
from effsam3.show import show

RECIPE = Path(__file__).parents[2] / "recipes" / "stage2" / "memory.yaml"


@pytest.fixture(scope="module")
def reference():
    return lively_tracker()


@pytest.mark.parametrize("mode", MODES)
def test_objects_together_are_objects_one_by_one(reference, mode):
    tracker = trained(efficient(reference, memory_mode=mode))
    steps, top, pointers = random_steps(tracker, 3, 4)
    together = run_steps(tracker, steps, top, pointers)
    for one in range(3):
        mine = slice(one, one + 1)
        alone = run_steps(
            tracker,
            [tuple(x[mine] for x in step) for step in steps],
            top[mine],
            [(distance, pointer[mine]) for distance, pointer in pointers],
        )
        torch.testing.assert_close(together[mine], alone, rtol=0, atol=2e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_one_frames_features_serve_all_objects(reference):
    tracker = efficient(reference)
    (top, logits, present), *_ = random_steps(tracker, 3, 1)[0]
    shared = tracker.remember(top[:1], logits, present, False)
    repeated = tracker.remember(top[:1].expand(3, -1, -1, -1), logits, present, False)
    torch.testing.assert_close(shared.map_ONM, repeated.map_ONM, rtol=0, atol=1e-5)
    torch.testing.assert_close(shared.latents_OLM, repeated.latents_OLM, rtol=0, atol=1e-5)


def test_an_absent_object_gets_the_occlusion_embedding(reference):
    tracker = efficient(reference, memory_mode="dense")
    (top, logits, _), *_ = random_steps(tracker, 2, 1)[0]
    present, mixed = (
        tracker.remember(top, logits, torch.tensor([True, second]), False).map_ONM for second in (True, False)
    )
    assert torch.equal(present[0], mixed[0])
    expected = present[1] + tracker.occlusion_spatial_embedding_parameter
    torch.testing.assert_close(mixed[1], expected, rtol=0, atol=1e-5)


def test_prompted_masks_are_hard_in_evaluation_only(reference):
    tracker = efficient(reference, memory_mode="dense")
    (top, logits, present), *_ = random_steps(tracker, 2, 1)[0]
    hard = torch.where(logits > 0, 100.0, -100.0)

    def same(prompted):
        # At the encoder's own resolution, where nothing is interpolated.
        big, big_hard = (x.repeat_interleave(4, -1).repeat_interleave(4, -2) for x in (logits, hard))
        soft, sharp = (tracker.remember(top, x, present, prompted).map_ONM for x in (big, big_hard))
        return torch.allclose(soft, sharp, atol=1e-5)

    assert same(True) and not same(False)
    tracker.train()
    assert not same(True)


@pytest.mark.parametrize(("mode", "hot"), [*((mode, 1) for mode in MODES), ("hybrid", 0), ("hybrid", 3)])
def test_tokens_are_as_many_as_announced(reference, mode, hot):
    tracker = efficient(reference, memory_mode=mode, memory_hot_frames=hot)
    steps, top, pointers = random_steps(tracker, 1, 7)
    seen = []
    tracker.memory_attention.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    run_steps(tracker, steps, top, pointers)
    assert seen[0].values_ONM.shape[1] == memory_tokens(tracker.config, frames=7, pointers=3)


def tokens_of_a_recall(tracker, frames, pointers, top, **options):
    """What the memory attention is given."""
    seen = []
    hook = tracker.memory_attention.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    tracker.recall(top, frames, pointers, **options)
    hook.remove()
    return seen[0]


def test_tokens_of_a_hybrid_bank(reference):
    """Values, encodings, rotary positions and biases against a bank laid out by loops."""
    tracker = trained(efficient(reference))
    tracker.memory_resampler.window_log_multiplicity.data.fill_(0.7)
    steps, top, pointers = random_steps(tracker, 2, 3)
    memories = [tracker.remember(*step, is_prompted=False) for step in steps]
    frames = list(zip([0, 2, 1], memories, strict=True))
    found = tokens_of_a_recall(tracker, frames, pointers, top)

    sine = tracker.memory_encoder.position_encoding((1, 64, GRID, GRID), "cpu", torch.float32)[0]
    expected = []

    def add_windows(values, side, temporal, bias):
        number = 0
        for row in range(0, GRID, side):
            for column in range(0, GRID, side):
                encoding = sine[:, row : row + side, column : column + side].mean((1, 2)) + temporal
                centre = (column + (side - 1) / 2, row + (side - 1) / 2)
                expected.append((values[:, number], encoding, centre, bias))
                number += 1

    slots = tracker.memory_temporal_positional_encoding[:, 0, 0]  # a frame one back has the first, a prompted the last
    for memory, slot in ((memories[0], 6), (memories[2], 0)):
        add_windows(memory.map_ONM, 2, slots[slot], 2 * math.log(2))
    for number in range(4):
        expected.append((memories[1].latents_OLM[:, number], slots[1], (0, 0), 0.0))
    add_windows(memories[1].latents_OLM[:, 4:], 2, slots[1], 0.7)
    for distance, pointer in pointers:
        sines = get_1d_sine_pe(torch.tensor([distance / 15]), dim=WIDTH)
        encoding = tracker.temporal_positional_encoding_projection_layer(sines)[0]
        for half in pointer.split(64, 1):
            expected.append((half, encoding, (0, 0), 0.0))

    values, encodings, positions, biases = zip(*expected, strict=True)
    torch.testing.assert_close(found.values_ONM, torch.stack(values, 1))
    torch.testing.assert_close(found.encoding_NM, torch.stack(encodings), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.position_NX, torch.tensor(positions, dtype=torch.float32))
    torch.testing.assert_close(found.bias_N, torch.tensor(biases))
    shorter = tokens_of_a_recall(tracker, frames, [(15, pointers[0][1])], top).encoding_NM[-1]
    same = tokens_of_a_recall(tracker, frames, [(4, pointers[0][1])], top, video_frames=5).encoding_NM[-1]
    torch.testing.assert_close(same, shorter)  # the longest distance of a video, and of its pointers


def test_pooled_maps_are_means_of_the_dense_map(reference):
    tracker = efficient(reference, memory_mode="dense")
    (step, *_), *_ = random_steps(tracker, 2, 1)
    dense = tracker.remember(*step, is_prompted=False).map_ONM
    tracker.config.memory_mode = "hybrid"
    memory = tracker.remember(*step, is_prompted=False)
    mean = F.avg_pool2d(dense.transpose(1, 2).unflatten(2, (GRID, GRID)), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(memory.map_ONM, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(memory.latents_OLM[:, 4:], mean, rtol=0, atol=1e-5)  # untrained: average pooling too


def cells():
    """Column and row of every cell, row by row, (N, 2)."""
    return torch.tensor([[column, row] for row in range(GRID) for column in range(GRID)], dtype=torch.float32)


def rope_by_complex_numbers(tokens_ND, grid_positions_N2):
    """Axial rotary encoding as SAM 2 defines it: half of the channels for columns, half for rows."""
    quarter = tokens_ND.shape[1] // 4
    frequencies = 10000.0 ** (-torch.arange(quarter) / quarter)
    angles = torch.cat([grid_positions_N2[:, :1] * frequencies, grid_positions_N2[:, 1:] * frequencies], 1)
    pairs = torch.view_as_complex(tokens_ND.unflatten(1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)


def pooled_by_windows(cells_NM):
    """Means of 2 x 2 cells of one map."""
    return F.avg_pool2d(cells_NM.T.reshape(-1, GRID, GRID), 2).flatten(1).T


def pooled_attention(attention, query_NC, values_NM, encodings_NM, frames):
    """One object reads maps of means, rotated at their windows' centres and weighing as four, then pointers."""
    query = rope_by_complex_numbers(attention.q_proj(query_NC), cells())
    keys, values = [], []
    for frame in range(frames):
        of_frame = slice(frame * GRID**2, (frame + 1) * GRID**2)
        mean, encoding = pooled_by_windows(values_NM[of_frame]), pooled_by_windows(encodings_NM[of_frame])
        keys.append(rope_by_complex_numbers(attention.k_proj(mean + encoding), pooled_by_windows(cells())))
        values.append(mean)
    keys.append(attention.k_proj((values_NM + encodings_NM)[frames * GRID**2 :]))
    logits = query @ torch.cat(keys).T / math.sqrt(query.shape[1])
    logits[:, : frames * GRID**2 // 4] += math.log(4)
    return attention.o_proj(logits.softmax(1) @ attention.v_proj(torch.cat([*values, values_NM[frames * GRID**2 :]])))


def test_pooled_memory_attends_to_means(reference):
    """Against the formula, laid out from the dense bank."""
    tracker = efficient(reference, memory_mode="dense")
    steps, top, pointers = random_steps(tracker, 1, 3)
    offsets = [0, 2, 1]

    def bank():
        return [(offset, tracker.remember(*step, False)) for offset, step in zip(offsets, steps, strict=True)]

    dense = tokens_of_a_recall(tracker, bank(), pointers, top)
    tracker.config.memory_mode = "pooled"
    found = tracker.recall(top, bank(), pointers)

    attention = tracker.memory_attention
    sine = attention.query_encoding(top.shape, "cpu", torch.float32)
    query = (top + 0.1 * sine).flatten(2).transpose(1, 2)
    rope = attention.rotary_emb(query, attention.position_ids)
    for layer in attention.layers:
        normed = layer.layer_norm1(query)[:, None]
        query = query + layer.self_attn(normed, normed, normed, rope)[0][:, 0]
        read = pooled_attention(
            layer.cross_attn_image, layer.layer_norm2(query)[0], dense.values_ONM[0], dense.encoding_NM, 3
        )
        query = query + read
        query = query + layer.linear2(F.relu(layer.linear1(layer.layer_norm3(query))))
    expected = attention.layer_norm(query).transpose(1, 2).unflatten(2, (GRID, GRID))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_tokens_at_full_size():
    config = EfficientTrackerConfig()
    for mode, expected in {"dense": 36352, "pooled": 9136, "hybrid": 3296, "latents": 960}.items():
        config.memory_mode = mode
        assert memory_tokens(config) == expected


@pytest.mark.parametrize("checkpoint", ["tiny", "random"])
def test_show_counts_the_tokens_that_the_tracker_reads(checkpoint):
    chassis = SAM3S[checkpoint].config().tracker_config
    for mode, hot in [*((mode, 1) for mode in MODES), ("hybrid", 0), ("hybrid", 9)]:
        keys = [f"memory.mode={mode}", f"memory.hot_frames={hot}", "memory.attention_layers=2"]
        recipe = load_recipe(RECIPE, [*keys, f"sam3.checkpoint={checkpoint}"])
        read, dense = (
            memory_tokens(tracker_config(chassis, replace(recipe.memory, mode=each))) for each in (mode, "dense")
        )
        line = f"# memory    {mode}: {read:,} tokens of 7 frames and 16 pointers, {dense:,} when dense"
        # Then come operations, for the sizes that have been counted.
        assert any(re.match(re.escape(line) + r"($|; [\d.,]+ GFLOP )", said) for said in show(recipe).splitlines())


def test_modes_share_their_weights_and_switch_by_config(reference):
    tracker = trained(efficient(reference, memory_mode="dense"))
    steps, top, pointers = random_steps(tracker, 2, 4)
    outputs = {}
    for mode in (*MODES, "dense"):
        tracker.config.memory_mode = mode
        output = run_steps(tracker, steps, top, pointers)
        if mode in outputs:
            assert torch.equal(output, outputs[mode])
        outputs[mode] = output
        config = EfficientTrackerConfig(**options(**LATENTS, memory_mode=mode))
        assert EfficientTracker(config).state_dict().keys() == tracker.state_dict().keys()
    for mode, output in outputs.items():
        assert mode == "dense" or (output - outputs["dense"]).abs().max() > 1e-2


def test_a_pool_of_one_cell_is_dense(reference):
    tracker = efficient(reference, memory_mode="dense")
    arguments = random_steps(tracker, 2, 4)
    dense = run_steps(tracker, *arguments)
    tracker.config.memory_mode, tracker.config.memory_pool = "pooled", 1
    assert torch.equal(run_steps(tracker, *arguments), dense)


def test_bfloat16_autocast_stays_close(reference):
    tracker = trained(efficient(reference))
    arguments = random_steps(tracker, 2, 4)
    exact = run_steps(tracker, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = run_steps(tracker, *arguments)
    assert rounded.isfinite().all()
    assert F.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0) > 0.99


# ---- gradients

LEARNS = {
    "dense": ("memory_encoder", "memory_attention"),
    "pooled": ("memory_encoder", "memory_attention"),
    "latents": ("memory_encoder", "memory_attention", "memory_resampler"),
    "hybrid": ("memory_encoder", "memory_attention", "memory_resampler"),
}
ALWAYS = (
    "memory_temporal_positional_encoding",
    "occlusion_spatial_embedding_parameter",
    "temporal_positional_encoding_projection_layer.weight",
)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_all_of_the_memory_through_time(reference, mode):
    tracker = trained(efficient(reference, memory_mode=mode)).train()
    parameters = {
        name: parameter
        for name, parameter in tracker.named_parameters()
        if name.startswith(LEARNS[mode]) or name in ALWAYS
    }
    for parameter in parameters.values():
        parameter.requires_grad_()
    steps, top, pointers = random_steps(tracker, 2, 4)
    first = steps[0][0].requires_grad_()
    pointers[0][1].requires_grad_()
    for repeat in range(2):  # the graph can be built again: nothing stored was changed in place
        run_steps(tracker, steps, top, pointers).square().sum().backward()
        if repeat == 0:
            once = first.grad.clone()
    torch.testing.assert_close(first.grad, 2 * once)
    assert once.any() and pointers[0][1].grad.any()
    silent = {name for name, parameter in parameters.items() if parameter.grad is None or not parameter.grad.any()}
    # The softmax does not feel what is added to every key alike.
    assert all(name.endswith("k_proj.bias") for name in silent), silent
    assert all(parameter.grad.isfinite().all() for parameter in parameters.values())
    frozen = dict(tracker.named_parameters()).keys() - parameters.keys()
    assert all(tracker.get_parameter(name).grad is None for name in frozen)


def test_memory_of_a_mask_learns_from_a_later_frame(reference):
    """Through remember, recall, decoder and remember again: back-propagation through time."""
    tracker = efficient(reference)
    steps, top, pointers = random_steps(tracker, 1, 2)
    (image, logits, present), (later, _, _) = steps
    logits.requires_grad_()
    first = tracker.remember(image, logits, present, False)
    conditioned = tracker.recall(later, [(0, first)], pointers)
    second = tracker.remember(later, conditioned.mean(1, keepdim=True), present, False)
    tracker.recall(top, [(1, second)], pointers).sum().backward()
    assert logits.grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_mode": "pool"}, "memory_mode: no 'pool'; did you mean pooled"),
        ({"memory_pool": 3}, "memory_pool: windows of 3x3 cells do not tile the 8x8 grid; choose from 1, 2, 4, 8"),
        ({"memory_pool": 0}, "memory_pool: windows of 0x0"),
        ({"memory_window_latents": 64 * 4}, "memory_window_latents: 256 windows do not tile the 8x8 grid"),
    ],
)
def test_a_memory_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(MemoryConfigError, match=message):
        EfficientTracker(EfficientTrackerConfig(**options(**(LATENTS | changes))), remove_vision_encoder=True)
