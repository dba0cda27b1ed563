# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) of a SAM 3, by peft."""
