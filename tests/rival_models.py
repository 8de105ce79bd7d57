"""Models of all kinds of memory, and what of their states can be read, for the tests of rivals."""

import dataclasses

import numpy as np
from reference import N, as_pretrained, decoder_config, fam_config

BLOCK = {"schedule": "block"}
ABSOLUTE = {"positions": "absolute"}


def rival(kind, memory=None, **changes):
    """A tiny model of a kind, in the block schedule if it has no other."""
    rows = {} if kind == "feedback" else {"fam_length": N}
    more = {"summaries": 2} if kind == "autocompressor" else {}
    schedule = {} if kind == "summary" else BLOCK
    return decoder_config({"kind": kind, **rows, **more, **(memory or {})}, **{**schedule, **changes})


VARIANTS = {
    "no feed-forward": fam_config({"fam_ff": False}),
    "no feed-forward, first residual": fam_config({"fam_ff": False, "first_residual": "fam"}, **BLOCK),
    "prefix": fam_config({"fam_init": "prefix"}),
    "prefix, pinned, parallel": fam_config(
        {"fam_init": "prefix", "prompt_positions": "pinned", **ABSOLUTE}, parallel_block=True, **BLOCK
    ),
    "three FAM": fam_config({"fam_blocks": 3}, **BLOCK),
    "two FAM, no segments, absolute, fractional": fam_config(
        {"fam_blocks": 2, "segments": 0, "fam_positions": "fractional", **ABSOLUTE}
    ),
    "two FAM, zero positions": fam_config({"fam_blocks": 2, "fam_positions": "zero", **ABSOLUTE}),
    "one layer of three": fam_config({"layers": (1,)}, num_layers=3),
    "two layers of three, two FAM": fam_config({"layers": (0, 2), "fam_blocks": 2}, num_layers=3, **BLOCK),
}
RIVALS = {
    "summary": rival("summary"),
    "summary, parallel, old query slot, no segments": rival(
        "summary", {"fam_query": "old", "segments": 0}, parallel_block=True, **BLOCK
    ),
    "summary, prefix, two FAM, no feed-forward": rival(
        "summary", {"fam_init": "prefix", "fam_blocks": 2, "fam_ff": False}
    ),
    "summary, all that pretrained models have": as_pretrained(rival("summary")),
    "feedback": rival("feedback"),
    "feedback, two segments, window, absolute": rival("feedback", {"segments": 2, "window": 6, **ABSOLUTE}),
    "feedback, all that pretrained models have": as_pretrained(rival("feedback", parallel_block=True)),
    "rmt": rival("rmt", {"segments": 0}),
    "rmt, a segment, absolute, parallel": rival("rmt", {"segments": 1, **ABSOLUTE}, parallel_block=True),
    "rmt, all that pretrained models have": as_pretrained(rival("rmt")),
    "autocompressor": rival("autocompressor", {"segments": 0}),
    "autocompressor, a segment, all of the past, absolute": rival(
        "autocompressor", {"summaries": 5, **ABSOLUTE}, num_kv_heads=1
    ),
}
ALL = {**VARIANTS, **RIVALS}
KINDS = {
    "no feed-forward": VARIANTS["no feed-forward"],
    "prefix": VARIANTS["prefix"],
    "three FAM": dataclasses.replace(VARIANTS["three FAM"], schedule="layer"),
    "one layer of three": VARIANTS["one layer of three"],
    "summary": RIVALS["summary"],
    "feedback": RIVALS["feedback"],
    "rmt": RIVALS["rmt, a segment, absolute, parallel"],
    "autocompressor": RIVALS["autocompressor"],
}


def readable(state):
    """What later tokens can read of a state."""
    blocks, offset = np.asarray(state.blocks), np.asarray(state.offset)
    out = {"offset": offset, "blocks": blocks, "fresh": np.asarray(state.fresh)}
    out["fam"] = np.where(out["fresh"][None, :, None, None], 0.0, state.fam)
    for name, axes in (("segment", 3), ("fam", 3)):
        for part in "kv":
            leaf = getattr(state, f"{name}_{part}")
            if leaf is not None:
                age = np.arange(leaf.shape[2])[::-1]
                written = (age < blocks[:, None])[(None, slice(None), slice(None), *[None] * axes)]
                out[f"{name}_{part}"] = np.where(written, leaf, 0.0)
    for name in ("open", "output"):
        for part in "kv":
            leaf = getattr(state, f"{name}_{part}")
            if leaf is not None:
                there = (np.arange(leaf.shape[2]) < offset[:, None])[None, :, :, None, None]
                out[f"{name}_{part}"] = np.where(there, leaf, 0.0)
    if state.summaries is not None:
        age = np.arange(state.summaries.shape[1])[::-1]
        out["summaries"] = np.where((age < blocks[:, None])[:, :, None, None], state.summaries, 0.0)
    return out
