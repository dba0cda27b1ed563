# SPDX-License-Identifier: Apache-2.0
"""Embedding store: a folder of fixed-size records that many processes write and training reads without copies.

    manifest.json          what a record is and how it was made; once finished, also how many there are
    shard-WWWWW-NNNN.bin   records of writer W, record i at i * stride
    shard-WWWWW-NNNN.tsv   their journal: a header, then per record its key and the xxh3_64 of its payload in hex
    skipped-WWWWW.tsv      key and reason of what could not be embedded
    writer-WWWWW.lock      locked while writer W lives
    keys-STAMP.index       where each key's record is, once finished; made from the journals, and may be deleted

Fields are named `features`, `scale` (of int8 features), `pixels` (uint8 RGB 0-255) and `tokens` (text).

A key names what its features were made of, not only whose they are: an image's ends in the digest of its bytes, a
text's is the hash of the text. So features of something else are never found; an input that has changed is a new key,
and the record of the old one stays where it is.

A record exists once its journal line does, and the line is written after the payload. A killed process therefore
leaves at most one payload without a line, or half a line; both are cut when the store is opened for writing again. A
power failure can also lose, in any order, what the kernel had not yet put on disk. So every SYNC_BYTES the payload is
synced and then the journal, and repair reads that much of the end of each writer's last shard and cuts at the first
record whose checksum is wrong.

The types on disk are in format.py; reading and verifying in reader.py, writing in writer.py.
"""
