# SPDX-License-Identifier: Apache-2.0
"""Efficient memory attention and resampler, against transformers and against formulas written as loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Sam3TrackerVideoConfig
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import (
    Sam3TrackerVideoMemoryAttention,
    Sam3TrackerVideoPositionEmbeddingSine,
)

from effsam3.models.memory.attention import EfficientMemoryAttention, MemoryTokens, rotate
from effsam3.models.memory.config import MemoryConfigError
from effsam3.models.memory.resampler import PerceiverResampler, coordinates, windows

MEMORY = 64  # channels of the memory; transformers' attention knows no other


def attention_config(grid, width=128, layers=2, **options):
    return Sam3TrackerVideoConfig(
        image_size=14 * grid,
        memory_attention_hidden_size=width,
        memory_attention_num_layers=layers,
        memory_attention_feed_forward_hidden_size=2 * width,
        **options,
    )


def lively(module, seed=0):
    """Weights with which attention is far from uniform, so that every term of a formula shows in the output."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        std = 1.5 * parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.3
        nn.init.normal_(parameter, std=std)
    return module.eval()


def cells(grid):
    """Column and row of every cell, row by row, (N, 2)."""
    return torch.tensor([[column, row] for row in range(grid) for column in range(grid)], dtype=torch.float32)


def sine(grid, width):
    encoding = Sam3TrackerVideoPositionEmbeddingSine(num_position_features=width // 2, normalize=True)
    return encoding((1, width, grid, grid), "cpu", torch.float32)[0]


def random_tokens(objects, grid, frames, extra=0, seed=1):
    """Values (O, N, M), encodings (N, M) and positions (N, 2) of dense frames and of tokens without a position."""
    generator = torch.Generator().manual_seed(seed)
    count = frames * grid**2 + extra
    values = torch.randn(objects, count, MEMORY, generator=generator)
    encodings = torch.randn(count, MEMORY, generator=generator)
    return values, encodings, torch.cat([cells(grid).repeat(frames, 1), torch.zeros(extra, 2)])


# ---- windows and positions


def test_windows_are_cut_row_by_row():
    map_OMGG = torch.arange(2 * 3 * 36.0).reshape(2, 3, 6, 6)
    cut = windows(map_OMGG, 3)
    assert cut.shape == (2, 4, 9, 3)
    for window, (top, left) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        expected = map_OMGG[:, :, top : top + 3, left : left + 3].flatten(2).transpose(1, 2)
        assert torch.equal(cut[:, window], expected)


@pytest.mark.parametrize(("grid", "side"), [(8, 1), (8, 2), (12, 3)])
def test_the_mean_position_of_a_window_is_its_centre(grid, side):
    centres = windows(coordinates(grid, torch.device("cpu"))[None], side).mean(2)[0]
    axis = [(i + 0.5) * side - 0.5 for i in range(grid // side)]
    assert centres.tolist() == [[column, row] for row in axis for column in axis]
    if side == 1:
        assert torch.equal(centres, EfficientMemoryAttention(attention_config(grid)).position_ids.float())


def test_rotation_knows_only_relative_positions_and_the_origin_is_none():
    attention = EfficientMemoryAttention(attention_config(8))
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 128)
    here, there, shift = torch.tensor([[2.0, 5.0]]), torch.tensor([[3.5, 0.5]]), torch.tensor([[1.5, 2.0]])

    def product(at_query, at_key):
        return (
            rotate(query, attention.rotary_emb(query, at_query)) * rotate(key, attention.rotary_emb(key, at_key))
        ).sum()

    torch.testing.assert_close(product(here, there), product(here + shift, there + shift), rtol=0, atol=1e-4)
    assert (product(here, there) - product(here, there + shift)).abs() > 0.1
    origin = attention.rotary_emb(query, torch.zeros(1, 2))
    assert torch.equal(rotate(query, origin), query)


# ---- attention


def both_attentions(config):
    """transformers' memory attention and ours, with the same weights: names and shapes are the same."""
    reference = lively(Sam3TrackerVideoMemoryAttention(config))
    own = EfficientMemoryAttention(config).eval()
    own.load_state_dict(reference.state_dict())
    return reference, own


def reference_output(reference, top_OCGG, values, encodings, pointer_tokens):
    """transformers' memory attention on our arguments, one object at a time."""
    grid, width = top_OCGG.shape[-1], top_OCGG.shape[1]
    outputs = []
    for top_CGG, value in zip(top_OCGG, values, strict=True):
        output = reference(
            current_vision_features=top_CGG.flatten(1).T[:, None],
            current_vision_position_embeddings=sine(grid, width).flatten(1).T[:, None],
            memory=value[:, None],
            memory_posision_embeddings=encodings[:, None],
            num_object_pointer_tokens=pointer_tokens,
        )
        outputs.append(output.reshape(grid, grid, width).permute(2, 0, 1))
    return torch.stack(outputs)


@pytest.mark.parametrize(("grid", "width", "frames", "objects"), [(4, 128, 1, 1), (8, 128, 3, 2), (72, 128, 1, 1)])
@torch.no_grad()
def test_dense_memory_is_transformers_memory_attention(grid, width, frames, objects):
    reference, own = both_attentions(attention_config(grid, width, layers=1 if grid == 72 else 3))
    values, encodings, positions = random_tokens(objects, grid, frames, extra=8)
    top = torch.randn(objects, width, grid, grid)
    expected = reference_output(reference, top, values, encodings, 8)
    found = own(top, MemoryTokens(values, encodings, positions, None))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    moved = MemoryTokens(values, encodings, positions.roll(1, 0), None)
    assert (own(top, moved) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_a_tokens_bias_counts_how_often_it_stands_there():
    grid, times = 8, 9
    attention = lively(EfficientMemoryAttention(attention_config(grid)))
    values, encodings, positions = random_tokens(2, grid, 1, extra=5)
    top = torch.randn(2, 128, grid, grid)
    bias = torch.zeros(len(encodings))
    bias[:20] = math.log(times)
    found = attention(top, MemoryTokens(values, encodings, positions, bias))
    repeats = torch.ones(len(encodings), dtype=torch.long)
    repeats[:20] = times
    repeated = MemoryTokens(*(x.repeat_interleave(repeats, -2) for x in (values, encodings, positions)), bias_N=None)
    torch.testing.assert_close(found, attention(top, repeated), rtol=0, atol=1e-5)
    assert (found - attention(top, MemoryTokens(values, encodings, positions, None))).abs().max() > 1e-3


@torch.no_grad()
def test_any_number_of_tokens_is_attended():
    """Fewer memory tokens than queries, of which the published attentions make nothing."""
    attention = lively(EfficientMemoryAttention(attention_config(8)))
    values, encodings, _ = random_tokens(3, 1, 7)
    output = attention(torch.randn(3, 128, 8, 8), MemoryTokens(values, encodings, torch.rand(7, 2) * 7, None))
    assert output.shape == (3, 128, 8, 8) and output.isfinite().all()


# ---- resampler


def resampler(grid=8, global_latents=3, window_latents=16, depth=2):
    torch.manual_seed(0)
    return PerceiverResampler(MEMORY, grid, global_latents, window_latents, depth)


def trained(module):
    """A resampler whose layers do something."""
    torch.manual_seed(1)
    for parameter in module.layers.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def test_untrained_window_latents_are_average_pooling():
    map_OMGG = torch.randn(2, MEMORY, 8, 8)
    latents = resampler()(map_OMGG, sine(8, MEMORY))
    assert latents.shape == (2, 19, MEMORY)
    expected = F.avg_pool2d(map_OMGG, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(latents[:, 3:], expected, rtol=0, atol=1e-6)
    noise = latents[:, :3] - map_OMGG.mean((2, 3))[:, None]
    assert 0.01 < noise.std() < 0.03


@pytest.mark.parametrize(
    ("grid", "window_latents", "side"), [(72, 64, 9), (72, 36, 12), (16, 64, 2), (8, 1, 8), (8, 64, 1)]
)
def test_windows_that_tile(grid, window_latents, side):
    built = resampler(grid, window_latents=window_latents)
    assert built.side == side
    assert built.window_log_multiplicity.item() == pytest.approx(math.log(side * side))
    assert built.log_multiplicity().tolist()[:4] == pytest.approx([0.0, 0.0, 0.0, math.log(side * side)])


@pytest.mark.parametrize(("grid", "count"), [(72, 100), (72, 50), (16, 0), (16, 9)])
def test_windows_that_do_not_tile_name_the_key_and_what_would(grid, count):
    fitting = {16: "1, 4, 16, 64, 256", 72: "1, 4, 9, 16, 36, 64, 81, 144, 324, 576, 1296, 5184"}[grid]
    with pytest.raises(
        MemoryConfigError, match=f"memory_window_latents: {count} windows do not tile the {grid}x{grid} grid"
    ) as error:
        resampler(grid, window_latents=count)
    assert str(error.value).endswith(f"choose from {fitting}")


def resampler_by_loops(module, map_MGG, encoding_MGG):
    """The resampler of one object, one latent at a time, each attention written as a softmax of products."""

    def attend(attention, query_M, keys_NM, values_NM):
        logits = attention.k_proj(keys_NM) @ attention.q_proj(query_M) / math.sqrt(MEMORY)
        return attention.o_proj(logits.softmax(0) @ attention.v_proj(values_NM))

    grid, side = map_MGG.shape[-1], module.side
    cut = [(row, column) for row in range(0, grid, side) for column in range(0, grid, side)]
    own = [map_MGG[:, r : r + side, c : c + side].flatten(1).T for r, c in cut]
    everything, encoding = map_MGG.flatten(1).T, encoding_MGG.flatten(1).T
    places = [torch.zeros(MEMORY)] * len(module.global_offset)
    places += [encoding_MGG[:, r : r + side, c : c + side].mean((1, 2)) for r, c in cut]
    latents = [map_MGG.mean((1, 2)) + offset for offset in module.global_offset]
    latents += [cells_KM.mean(0) + offset for cells_KM, offset in zip(own, module.window_offset, strict=True)]
    for layer in module.layers:
        read = []
        for i, latent in enumerate(latents):
            window = i - len(module.global_offset)
            keys = layer.map_norm(own[window]) if window >= 0 else layer.map_norm(everything) + encoding
            read.append(latent + attend(layer.cross_attn, layer.cross_norm(latent), keys, keys))
        latents = [x + layer.cross_feed_forward(x) for x in read]
        normed = torch.stack([layer.self_norm(x) for x in latents])
        placed = normed + torch.stack(places)
        latents = [x + attend(layer.self_attn, q, placed, normed) for x, q in zip(latents, placed, strict=True)]
        latents = [x + layer.self_feed_forward(x) for x in latents]
    return torch.stack(latents)


@torch.no_grad()
def test_resampler_is_its_formula():
    module = trained(resampler())
    nn.init.normal_(module.window_offset)
    map_OMGG, encoding = torch.randn(3, MEMORY, 8, 8), sine(8, MEMORY)
    expected = torch.stack([resampler_by_loops(module, map_MGG, encoding) for map_MGG in map_OMGG])
    torch.testing.assert_close(module(map_OMGG, encoding), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_window_reaches_other_window_latents_by_their_self_attention_only():
    module = trained(resampler())
    one = torch.randn(1, MEMORY, 8, 8)
    other = one.clone()
    other[:, :, 2:4, 2:4] += 3  # window 5 of 16
    encoding = sine(8, MEMORY)
    changed = (module(one, encoding) != module(other, encoding)).any(-1)[0]
    assert changed.all()
    for layer in module.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    changed = (module(one, encoding) != module(other, encoding)).any(-1)[0]
    assert changed[:3].all() and changed[3:].nonzero().flatten().tolist() == [5]


def test_every_parameter_of_a_resampler_learns():
    module = trained(resampler())
    latents = module(torch.randn(2, MEMORY, 8, 8), sine(8, MEMORY))
    (latents.square().sum() + module.log_multiplicity().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
