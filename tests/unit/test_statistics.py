# SPDX-License-Identifier: Apache-2.0
"""Feature statistics against torch's own, and the sample they are taken from."""

import torch

from effsam3.data.statistics import FeatureStatistics, statistics_sample


def test_equal_to_mean_and_deviation_of_valid_positions():
    feat = torch.randn(6, 4, 5, 5) * torch.tensor([1.0, 1000.0, 0.1, 5.0])[:, None, None] + 300
    valid = (torch.rand(6, 1, 5, 5) > 0.4).float()
    statistics = FeatureStatistics(4)
    for start in range(0, 6, 2):
        statistics.update(feat[start : start + 2], valid[start : start + 2])
    result = statistics.result()
    kept = feat.movedim(1, -1)[valid[:, 0] > 0].double()
    torch.testing.assert_close(torch.tensor(result["mean"]), kept.mean(0).float(), rtol=1e-6, atol=0)
    deviation = kept.std(0, correction=0).float()
    deviation = deviation.clamp(min=1e-3 * float(deviation.mean()))
    torch.testing.assert_close(torch.tensor(result["deviation"]), deviation, rtol=1e-4, atol=0)


def test_a_dead_channel_keeps_a_deviation_to_divide_by():
    statistics = FeatureStatistics(2)
    feat = torch.stack([torch.full((3, 3), 4.0), torch.randn(3, 3)])[None]
    statistics.update(feat, torch.ones(1, 1, 3, 3))
    dead, alive = statistics.result()["deviation"]
    assert 0 < dead < alive


def test_the_sample_is_chosen_by_key_alone():
    keys = [f"sa_{number}" for number in range(1000)]
    chosen = {keys[position] for position in statistics_sample(keys, 50)}
    backwards = keys[::-1]
    assert chosen == {backwards[position] for position in statistics_sample(backwards, 50)}
    assert len(chosen) == 50 and len(statistics_sample(keys[:7], 50)) == 7
