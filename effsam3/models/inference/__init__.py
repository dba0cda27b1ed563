# SPDX-License-Identifier: Apache-2.0
"""A merged model in use: prompts in, masks out."""
