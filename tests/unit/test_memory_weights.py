# SPDX-License-Identifier: Apache-2.0
"""Weights of the efficient tracker: cut out of SAM 3's, saved and read back, alone and in a whole model."""

import math
from copy import deepcopy
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from lively_trackers import (
    GRID,
    LATENTS,
    efficient,
    lively_tracker,
    moving_video,
    options,
    random_steps,
    run_steps,
    trained,
)
from transformers import AutoModel, Sam3TrackerModel, Sam3TrackerVideoModel, Sam3VideoConfig, Sam3VideoModel

from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.processor import processor
from effsam3.models.chassis.tensors import load_part, quiet_transformers, read_config, read_tensors
from effsam3.models.chassis.tiny import WIDTH
from effsam3.models.memory.config import EfficientTrackerConfig, MemoryConfigError
from effsam3.models.memory.tracker import EfficientTracker, efficient_tracker_tensors


@pytest.fixture(scope="module")
def reference():
    return lively_tracker()


def four_layers():
    return lively_tracker(memory_attention_num_layers=4)


def test_an_efficient_tracker_of_full_size_has_all_of_sam3s_weights(reference):
    tracker = efficient(reference)
    own = tracker.state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(own.pop(name), tensor)
    assert own and all(name.startswith("memory_resampler.") for name in own)
    tensors = [
        efficient_tracker_tensors(reference.state_dict(), tracker.config, seed=seed)["memory_resampler.global_offset"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(tensors[0], tensors[1]) and not torch.equal(tensors[0], tensors[2])


@pytest.mark.parametrize(("count", "kept"), [(2, [0, 3]), (3, [0, 2, 3]), (1, [0])])
def test_layers_that_are_kept(count, kept):
    source = four_layers().state_dict()
    config = EfficientTrackerConfig(**options(**LATENTS, memory_attention_num_layers=count))
    tensors = efficient_tracker_tensors(source, config)
    for place, layer in enumerate(kept):
        for name in ("cross_attn_image.k_proj.weight", "linear1.bias", "layer_norm3.weight"):
            expected = source[f"memory_attention.layers.{layer}.{name}"]
            assert torch.equal(tensors[f"memory_attention.layers.{place}.{name}"], expected)
    EfficientTracker(config).load_state_dict(tensors)


def test_a_narrower_memory_encoder_keeps_the_first_channels(reference):
    hidden = 48
    tracker = efficient(reference, memory_fuser_num_layers=1, memory_fuser_intermediate_dim=hidden)
    (block,) = tracker.memory_encoder.memory_fuser.layers
    full = reference.memory_encoder.memory_fuser.layers[0]
    features = torch.randn(2, WIDTH, GRID, GRID)
    inner = full.layer_norm(full.depthwise_conv(features)).permute(0, 2, 3, 1)
    inner = F.gelu(F.linear(inner, full.pointwise_conv1.weight[:hidden], full.pointwise_conv1.bias[:hidden]))
    update = full.scale * F.linear(inner, full.pointwise_conv2.weight[:, :hidden], full.pointwise_conv2.bias)
    torch.testing.assert_close(block(features), features + update.permute(0, 3, 1, 2), rtol=0, atol=1e-5)
    assert run_steps(tracker, *random_steps(tracker, 1, 3)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"memory_attention_num_layers": 5},
            "memory_attention_num_layers: 5 layers asked for, .* has 2; ask",
        ),
        ({"memory_fuser_num_layers": 3}, "no tensor memory_encoder.memory_fuser.layers.2"),
        (
            {"memory_fuser_intermediate_dim": 1024},
            r"pointwise_conv1.weight is \(256, 128\) .* and \(1024, 128\)",
        ),
        ({"memory_attention_feed_forward_hidden_size": 64}, r"linear1.weight is \(256, 128\)"),
    ],
)
def test_weights_that_cannot_be_cut(reference, changes, message):
    config = EfficientTrackerConfig(**options(**LATENTS, **changes))
    with pytest.raises(MemoryConfigError, match=message):
        efficient_tracker_tensors(reference.state_dict(), config)


# ---- folders and the whole model


def whole_config(chassis):
    """The tiny chassis' config with an efficient memory in its slot."""
    config = read_config(chassis).to_dict()
    del config["model_type"]
    config["tracker_config"] |= {"model_type": EfficientTrackerConfig.model_type, "memory_mode": "hybrid"}
    return Sam3VideoConfig(**config)


@pytest.fixture(scope="module")
def whole():
    chassis = chassis_folder("tiny")
    config = whole_config(chassis)
    tensors = {name: tensor for name, tensor in read_tensors(chassis).items() if not name.startswith("tracker_model.")}
    tracker = efficient_tracker_tensors(read_tensors(chassis, "tracker_model."), config.tracker_config)
    tensors |= {f"tracker_model.{name}": tensor for name, tensor in tracker.items()}
    return load_part(Sam3VideoModel(config), {name: tensor.clone() for name, tensor in tensors.items()})


def read_back(model_class, folder):
    """Load a folder and assert that every tensor of it found its place and none was made up."""
    with quiet_transformers():
        model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_equal_tensors(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tracker_is_saved_and_read_back(reference, tmp_path):
    tracker = trained(efficient(reference, memory_hot_frames=2, memory_mode="latents"))
    with quiet_transformers():
        tracker.save_pretrained(tmp_path, save_original_format=False)
    assert all(not name.startswith("tracker_model.") for name in read_tensors(tmp_path))
    for model_class in (EfficientTracker, AutoModel):
        again = read_back(model_class, tmp_path)
        assert type(again) is EfficientTracker
        assert (again.config.memory_hot_frames, again.config.memory_mode) == (2, "latents")
        assert_equal_tensors(again.state_dict(), tracker.state_dict())
        arguments = random_steps(tracker, 2, 3)
        torch.testing.assert_close(run_steps(again, *arguments), run_steps(tracker, *arguments), rtol=0, atol=1e-4)


def test_a_whole_model_is_saved_and_read_back_whole_and_in_part(whole, tmp_path):
    with quiet_transformers():
        whole.save_pretrained(tmp_path, save_original_format=False)
    again = read_back(Sam3VideoModel, tmp_path)
    assert type(again.tracker_model) is EfficientTracker
    assert_equal_tensors(again.state_dict(), whole.state_dict())
    alone = read_back(EfficientTracker, tmp_path)
    assert type(alone.config) is EfficientTrackerConfig and alone.config.memory_mode == "hybrid"
    vision = {
        "vision_encoder.backbone.": whole.detector_model.vision_encoder.backbone,
        "vision_encoder.neck.": whole.tracker_neck,
        "": whole.tracker_model,
    }
    expected = dict(
        chain.from_iterable(
            ((prefix + name, tensor) for name, tensor in part.state_dict().items()) for prefix, part in vision.items()
        )
    )
    assert_equal_tensors(alone.state_dict(), expected)


@pytest.mark.parametrize("model_class", [Sam3TrackerVideoModel, Sam3TrackerModel])
def test_transformers_own_trackers_refuse_an_efficient_memory(whole, model_class, tmp_path):
    """Without that they would only warn of missing weights and go on with random ones."""
    with quiet_transformers():
        whole.save_pretrained(tmp_path, save_original_format=False)
        with pytest.raises(MemoryConfigError, match="efficient memory.*; load it with .*memory.tracker.EfficientTra"):
            model_class.from_pretrained(tmp_path)


def test_sam_3_itself_is_read_with_an_untrained_memory():
    """From SAM 3's own folder only the resampler is missing, and it starts as average pooling."""
    with quiet_transformers():
        tracker, info = EfficientTracker.from_pretrained(chassis_folder("tiny"), output_loading_info=True)
    missing = info.pop("missing_keys")
    assert missing and all(name.startswith("memory_resampler.") for name in missing) and not any(info.values())
    for model in (tracker, EfficientTracker(tracker.config)):
        map_OMGG = torch.randn(1, 64, 16, 16)
        latents = model.memory_resampler(map_OMGG, torch.randn(64, 16, 16))
        pooled = F.avg_pool2d(map_OMGG, 2).flatten(2).transpose(1, 2)
        torch.testing.assert_close(latents[:, 64:], pooled, rtol=0, atol=1e-6)
        assert model.memory_resampler.window_log_multiplicity.item() == pytest.approx(math.log(4))
        assert 0.01 < model.memory_resampler.global_offset.std() < 0.03


@pytest.fixture
def eager(whole):
    """The whole model with thresholds under which random weights detect, keep and recondition objects."""
    model = deepcopy(whole)
    with torch.no_grad():
        model.tracker_model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(5.0)
    model.score_threshold_detection = model.new_det_thresh = model.high_conf_thresh = model.high_iou_thresh = 0.0
    model.det_nms_thresh, model.hotstart_delay, model.max_num_objects = 0.9, 0, 3
    model.assoc_iou_thresh = model.trk_assoc_iou_thresh = 0.0
    model.recondition_every_nth_frame = 3
    return model


def test_a_text_prompt_becomes_masklets_with_bounded_memory(eager):
    frames = 22
    video = (moving_video(frames, 64) + 1).mul(127.5).byte()
    tools = processor(eager.config)
    session = tools.init_video_session(video=video, inference_device="cpu", dtype=torch.float32)
    session = tools.add_text_prompt(session, "a cat")
    shown, entries = [], []
    for output in eager.propagate_in_video_iterator(inference_session=session):
        result = tools.postprocess_outputs(session, output)
        assert result["masks"].shape == (len(result["object_ids"]), 64, 64)
        shown.append(len(result["object_ids"]))
        entries.append([{kind: len(x) for kind, x in kept.items()} for kept in session.output_dict_per_obj.values()])
    assert len(shown) == frames and min(shown) > 0
    assert len(entries[-1]) == 3
    for kept in entries[-1]:
        assert kept["cond_frame_outputs"] <= 1 + 4 + 1
        assert kept["non_cond_frame_outputs"] <= 15 + 16
