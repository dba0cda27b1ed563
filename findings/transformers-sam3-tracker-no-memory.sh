#!/usr/bin/env bash
# transformers' Sam3TrackerModel, SAM 3's tracker for clicks on single images, adds SAM 3's "no memory" embedding to a
# feature map that it then drops. Its masks are those of a SAM 3 without this embedding; Sam3TrackerVideoModel's are right.
#
# Versions:  transformers 5.24.0, torch 2.13.0
# Behaviour: the neck has four levels (scale_factors 4, 2, 1, 0.5), the heads take three. The image class adds the
#            embedding to the last of the four, the video class to the last of the three. With the same weights and no
#            embedding both give the same mask. With one, the image class gives still that mask, to the last bit, and
#            the video class another.
# A guess:   one set of weights, one click, one image: the two classes agree, and every weight of the checkpoint counts.
# Seen:      without: image and video differ by 0.000 of the mask's range
#            with:    the image's mask changes by 0.000, the video's by 0.089
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.4.6

HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import (
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3TrackerVideoConfig,
    Sam3TrackerVideoInferenceSession,
    Sam3TrackerVideoModel,
)

SIDE, PATCH, GRID, WIDTH = 128, 16, 8, 64
backbone = {
    "model_type": "sam3_vit_model", "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH, "window_size": 4, "global_attn_indexes": [1],
    "pretrain_image_size": 64,
}
parts = {
    "vision_config": {
        "model_type": "sam3_vision_model", "backbone_config": backbone, "fpn_hidden_size": WIDTH,
        "backbone_feature_sizes": [[4 * GRID] * 2, [2 * GRID] * 2, [GRID] * 2],
    },
    "prompt_encoder_config": {"hidden_size": WIDTH, "image_size": SIDE, "patch_size": PATCH},
    "mask_decoder_config": {
        "hidden_size": WIDTH, "mlp_dim": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "iou_head_hidden_dim": WIDTH,
    },
}
memory = {
    "image_size": SIDE, "memory_attention_hidden_size": WIDTH, "memory_attention_num_layers": 1,
    "memory_attention_feed_forward_hidden_size": 2 * WIDTH, "memory_attention_rope_feat_sizes": [GRID, GRID],
    "memory_encoder_hidden_size": WIDTH, "mask_downsampler_embed_dim": WIDTH, "memory_fuser_embed_dim": WIDTH,
    "memory_fuser_intermediate_dim": 2 * WIDTH,
}  # small enough for a processor; the default number of levels

torch.manual_seed(0)
of_images = Sam3TrackerModel(Sam3TrackerConfig(**parts)).eval()
of_videos = Sam3TrackerVideoModel(Sam3TrackerVideoConfig(**parts, **memory)).eval()
for parameter in of_images.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.1)
of_images.no_memory_embedding.data.zero_()
of_images.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(1000.0)  # the object is there: its mask is given
unknown = of_videos.load_state_dict(of_images.state_dict(), strict=False).unexpected_keys
assert not unknown, unknown  # all of it is in the video class, too

pixels = torch.rand(1, 3, SIDE, SIDE)
points, labels = torch.tensor([[[[60.0, 40.0]]]]), torch.ones(1, 1, 1, dtype=torch.int)


@torch.no_grad()
def mask_of_image():
    prompt = {"input_points": points, "input_labels": labels, "multimask_output": False}
    return of_images(pixel_values=pixels, **prompt).pred_masks.flatten()


@torch.no_grad()
def mask_of_video():
    session = Sam3TrackerVideoInferenceSession(video=pixels, video_height=SIDE, video_width=SIDE, dtype=torch.float32)
    session.obj_id_to_idx(1)
    session.add_point_inputs(0, 0, {"point_coords": points, "point_labels": labels})
    session.obj_with_new_inputs = [1]
    return of_videos(inference_session=session, frame_idx=0).pred_masks.flatten()


def share(a, b):
    """The largest difference as a share of the mask's range."""
    return float((a - b).abs().max() / (a.max() - a.min()))


plain_image, plain_video = mask_of_image(), mask_of_video()
print(f"without: image and video differ by {share(plain_image, plain_video):.3f} of the mask's range")
for model in (of_images, of_videos):
    model.no_memory_embedding.data.fill_(1.0)
image, video = share(plain_image, mask_of_image()), share(plain_video, mask_of_video())
print(f"with:    the image's mask changes by {image:.3f}, the video's by {video:.3f}")
sys.exit(share(plain_image, plain_video) > 1e-4 or image != 0 or video < 0.01)
PYTHON
