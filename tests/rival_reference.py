"""FAM's variants and rivals written a second time, for reading: NumPy float64, from the equations of the paper.

Like `reference.py`, whose pieces they use: one row, one block, one layer and one token at a time, absolute positions.
"""

from typing import Any, NamedTuple

import numpy as np
from reference import Array, attend, fam_slots, finish, layers_of, logits_of, near, project, prompt_stream


class Read(NamedTuple):
    """What the decoders return."""

    logits: Array  # [t, v]
    memory: Array | None  # the FAM of all layers [L, N, d], or the kept summaries [s, N, d]; None with neither


def block_decoder(params: dict[str, Any], config: Any, tokens: Array) -> Read:
    """FAM (algorithm 2), static summary tokens (C.3) and Feedback Memory (C.2) over one document."""
    memory, size, cap = config.memory, config.memory.block_size, config.attention_softcap
    layers = layers_of(params, config)
    if memory.fam_init == "prefix":
        start = list(np.asarray(params["fam_prefix"], np.float64))
    else:
        start = prompt_stream(params, config, layers)
    has_fam = [bool(memory.fam_length) and (memory.layers is None or l in memory.layers) for l in range(len(layers))]
    fams = [[rows] for rows in start]  # of each layer F_0, F_1, ...
    past: list[list[tuple[Array, Array, Array]]] = [[] for _ in layers]
    outputs = []
    for n, begin in enumerate(range(0, len(tokens), size)):
        x = np.asarray(params["embed"], np.float64)[tokens[begin : begin + size]]
        where = begin + np.arange(len(x))
        for l, w in enumerate(layers):
            q, k, v = project(w, config, x, where)
            fam_keys = []  # of F_{n-1}, F_{n-2}, ... as numbered in the paper; fams[l][i] entered block i
            for entered in range(n, max(-1, n - memory.fam_blocks), -1) if has_fam[l] else ():
                slots, _ = fam_slots(memory, entered * size, prompt=entered == 0)
                fam_keys.append(project(w, config, fams[l][entered], slots)[1:])
            rows = []
            for t in range(len(x)):
                keys, values = [one for one, _ in fam_keys], [one for _, one in fam_keys]
                segments = past[l][max(0, n - memory.segments) :]
                for place, block_k, block_v in [*segments, (where[: t + 1], k[: t + 1], v[: t + 1])]:
                    seen = near(w, config, where[t] - place)
                    keys.append(block_k[seen])
                    values.append(block_v[seen])
                rows.append(attend(q[t], np.concatenate(keys), np.concatenate(values), cap))
            if len(x) == size and has_fam[l]:
                reader = start[l] if memory.kind == "summary" else fams[l][n]
                key_slots, query_slots = fam_slots(memory, begin, prompt=n == 0)
                queries = project(w, config, reader, key_slots, query_slots)[0]
                keys, values = np.concatenate([fam_keys[0][0], k]), np.concatenate([fam_keys[0][1], v])
                read = np.stack([attend(query, keys, values, cap) for query in queries])
                residual = reader
                if n == 0 and memory.kind == "fam" and memory.first_residual == "zero":
                    residual = np.zeros_like(reader)
                if memory.fam_ff:
                    fams[l].append(finish(w, config, reader, read, residual))
                else:
                    fams[l].append(np.einsum("fhk,hkd->fd", read, w["wo"]) + residual)
            x = finish(w, config, x, np.stack(rows), x)
            if memory.kind == "feedback":
                _, k, v = project(w, config, x, where)
            past[l].append((where, k, v))
        outputs.append(logits_of(params, config, x))
    last = [rows[-1] if has else np.zeros_like(rows[-1]) for rows, has in zip(fams, has_fam, strict=True)]
    return Read(np.concatenate(outputs), np.array(last) if memory.fam_length else None)


def concatenating_decoder(params: dict[str, Any], config: Any, tokens: Array) -> Read:
    """RMT and AutoCompressors over one document: a causal Transformer on [read rows; block; rows to write].

    RMT (Bulatov et al., 2022): both are the outputs at the rows that the block before wrote. AutoCompressors (Chevalier
    et al., 2023): summary vectors of all earlier segments are read, and the same summary tokens are written each time.
    """
    memory, size, n_rows = config.memory, config.memory.block_size, config.memory.fam_length
    layers, prompt = layers_of(params, config), np.asarray(params["fam_prompt"], np.float64)
    summaries: list[Array] = []
    past: list[list[tuple[Array, Array, Array]]] = [[] for _ in layers]
    outputs = []
    for n, begin in enumerate(range(0, len(tokens), size)):
        block = np.asarray(params["embed"], np.float64)[tokens[begin : begin + size]]
        if memory.kind == "rmt":
            write = summaries[-1] if summaries else prompt
            read = write
        else:
            write, read = prompt, np.concatenate([np.zeros((0, config.d_model)), *summaries[-memory.summaries :]])
        x = np.concatenate([read, block, write])
        first, end = len(read), len(read) + len(block)
        where = begin - len(read) + np.arange(len(x))
        for l, w in enumerate(layers):
            q, k, v = project(w, config, x, where)
            rows = []
            for i in range(len(x)):
                keys, values = [k[: i + 1]], [v[: i + 1]]
                if first <= i < end:  # tokens see the segments too
                    own = np.arange(i + 1)
                    seen = (own < first) | near(w, config, where[i] - where[: i + 1])
                    keys, values = [k[: i + 1][seen]], [v[: i + 1][seen]]
                    for place, block_k, block_v in past[l][max(0, n - memory.segments) :]:
                        seen = near(w, config, where[i] - place)
                        keys.append(block_k[seen])
                        values.append(block_v[seen])
                rows.append(attend(q[i], np.concatenate(keys), np.concatenate(values), config.attention_softcap))
            past[l].append((where[first:end], k[first:end], v[first:end]))
            x = finish(w, config, x, np.stack(rows), x)
        outputs.append(logits_of(params, config, x[first:end]))
        if len(block) == size:
            summaries.append(x[end:])
    kept = memory.summaries if memory.kind == "autocompressor" else 1
    last = np.zeros((kept, n_rows, config.d_model))
    for place, rows in enumerate(summaries[-kept:][::-1]):
        last[kept - 1 - place] = rows
    return Read(np.concatenate(outputs), last)


def rival_decoder(params: dict[str, Any], config: Any, tokens: Array) -> Read:
    """The one that the config asks for."""
    concatenating = config.memory.kind in ("rmt", "autocompressor")
    return (concatenating_decoder if concatenating else block_decoder)(params, config, tokens)
