# SPDX-License-Identifier: Apache-2.0
"""How much device memory a recipe takes, estimated without a device."""
