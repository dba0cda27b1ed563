# SPDX-License-Identifier: Apache-2.0
"""What goes to the Hub: the model card and the release folder."""
