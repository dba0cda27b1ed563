# SPDX-License-Identifier: Apache-2.0
"""The store of teacher embeddings: fixed-size records, an index by key, checksums."""
