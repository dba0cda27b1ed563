# SPDX-License-Identifier: Apache-2.0
"""What a run runs on: accelerate configs, the accelerator, the memory budget of devices."""
