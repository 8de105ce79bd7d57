"""Layers one after another, each reading the bank of those before it, with memory linear in depth.

Under a `jax.lax.scan` over layers the bank would be part of the carry, and the backward pass would keep a copy of all
of it for every layer. There are three ways round that, with the same gradients:

* write once: each slot is written by one layer and never changed, and no layer reads slots of later ones. So the
  finished bank can stand in for all its earlier versions: the backward pass keeps each layer's input and the bank,
  and recomputes layer after layer from the last to the first.
* push: where weights do not depend on activations, a layer's slot is added to all later layers' mixtures as soon as
  it is there. That is linear, so nothing of it has to be kept.
* pull: with such weights, too, each mixture is one product with the bank when its layer needs it, and the way back the
  same: the gradient of a layer's slot is one product with the gradients of later layers' mixtures, which are a bank
  that is written once, from the last layer to the first. Layers are computed again only if that is asked for.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lime_jax.depth import Depth
from lime_jax.mixer import Mixer

Banks = Mapping[str, Array]
Body = Callable[[Any, Any, Any, dict[str, Depth]], tuple[Any, dict[str, Any], Any]]


@jax.named_scope("layers")  # by which the loops are found in a compiled program, those of the backward pass too
def run_layers(
    mixer: Mixer,
    body: Body,
    consts: Any,
    carry: Any,
    xs: Any,
    banks: Banks,
    columns: Any = None,
    *,
    scan: bool = True,
    remat: bool = False,
    policy: Callable[..., Any] | None = None,
    rebuild: tuple[str, ...] = (),
) -> tuple[Any, Banks, Any]:
    """Runs all layers of a model.

    Args:
        mixer: Says how many slots there are, and how they are pushed or pulled.
        body: One layer: (consts, carry, x, depths) -> (carry, slots, y). `depths` has the Depth of every bank, `slots`
            the own slots, in their order, that the layer adds to it. It must not close over traced arrays.
        consts: What all layers share, any arrays.
        carry: What goes from layer to layer; floating point.
        xs: What each layer has of its own, with a leading layer axis.
        banks: The empty banks [j, ...] by name, slots before the first layer filled. None of them without mixing.
        columns: `mixer.columns` of all parameters, for the push and the pull form; of the latter one array [j, l, ...].
        scan: One compiled layer in a `jax.lax.scan`, or all layers unrolled.
        remat: Recompute a layer in the backward pass; the write-once form always does.
        policy: With `remat`, what is kept beside a layer's input, one of `jax.checkpoint_policies`; None is nothing. In
            the write-once form it makes no difference.
        rebuild: Names of banks whose slots depend on the layer's input alone; with `mixer.backward` "rebuild", they
            are not kept but recomputed at the start of the backward pass.

    Returns:
        The last carry, the filled banks (none in the push form, nor in the pull form of scanned layers), and every y
        stacked over layers.
    """
    if not banks:

        def plain(carry, x):
            carry, _, y = body(consts, carry, x, {})
            return carry, y

        if remat:
            plain = jax.checkpoint(plain, prevent_cse=not scan, policy=policy)
        carry, ys = _loop(plain, carry, xs, scan)
        return carry, banks, ys
    if mixer.backward == "push":
        return _push(mixer, body, consts, carry, xs, banks, columns, scan, remat, policy)
    if mixer.backward == "pull" and scan:
        return _pull(mixer, body, consts, carry, xs, banks, columns, remat, policy)
    if not scan:
        return _unrolled(mixer, body, consts, carry, xs, banks, remat, policy)
    return _write_once(mixer, body, consts, carry, xs, banks, rebuild if mixer.backward == "rebuild" else ())


def _loop(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, scan: bool) -> tuple[Any, Any]:
    """`jax.lax.scan`, or the same unrolled."""
    if scan:
        return jax.lax.scan(body, carry, xs)
    outputs = []
    for number in range(_length(xs)):
        carry, out = body(carry, _take(xs, number))
        outputs.append(out)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _length(xs: Any) -> int:
    return jax.tree.leaves(xs)[0].shape[0]


def _take(xs: Any, number: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[number], xs)


def split_floating(tree: Any) -> tuple[list[Array], list[Any], Callable[[list, list], Any]]:
    """Leaves that have gradients, the others, and what puts them together again."""
    leaves, structure = jax.tree.flatten(tree)
    floating = [bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating)) for leaf in leaves]

    def join(diff: list, rest: list) -> Any:
        parts = {True: iter(diff), False: iter(rest)}
        return jax.tree.unflatten(structure, [next(parts[is_diff]) for is_diff in floating])

    diff = [leaf for leaf, is_diff in zip(leaves, floating, strict=True) if is_diff]
    return diff, [leaf for leaf, is_diff in zip(leaves, floating, strict=True) if not is_diff], join


def _push(mixer, body, consts, carry, xs, banks, columns, scan, remat, policy):
    first, per = mixer.first, mixer.per_layer
    layers = _length(xs)

    def contribute(column, slot):
        return mixer.contribute(column, slot)

    def start(bank):
        wide = jnp.promote_types(bank.dtype, jnp.float32)
        total = jnp.zeros((layers, *bank.shape[1:]), wide)
        for slot in range(first):
            total += contribute(_take(columns, slot), bank[slot])
        return total

    def run(consts, carry, x, number, pushed):
        live = first + number * per
        depths = {name: Depth(None, live, number, (), value) for name, value in pushed.items()}
        return body(consts, carry, x, depths)

    if remat:
        run = jax.checkpoint(run, prevent_cse=not scan, policy=policy)

    def step(carry, x):
        carry, totals = carry
        x, number, column = x
        pushed = {name: total[number] for name, total in totals.items()}
        carry, slots, y = run(consts, carry, x, number, pushed)
        for position in range(per):
            weights = _take(column, position)
            totals = {name: total + contribute(weights, slots[name][position]) for name, total in totals.items()}
        return (carry, totals), y

    column = jax.tree.map(lambda leaf: leaf[first:].reshape(layers, per, *leaf.shape[1:]), columns)
    totals = {name: start(bank) for name, bank in banks.items()}
    (carry, _), ys = _loop(step, (carry, totals), (xs, jnp.arange(layers), column), scan)
    return carry, {}, ys


def _pull(mixer, body, consts, carry, xs, banks, columns, remat, policy):
    assert (mixer.first, mixer.per_layer) == (0, 1), "a layer's number is that of its slot"
    layers = _length(xs)
    diff, rest, join = split_floating((consts, carry, xs))

    def layer(consts, carry, x, number, pulled):
        depths = {name: Depth(None, number, number, (), mixture) for name, mixture in pulled.items()}
        carry, slots, y = body(consts, carry, x, depths)
        return carry, {name: slots[name][0] for name in banks}, y

    if remat:
        layer = jax.checkpoint(layer, prevent_cse=False, policy=policy)

    def write(packed, slots, number):
        return {
            name: jax.lax.dynamic_update_index_in_dim(bank, mixer.pack(slots[name]).astype(bank.dtype), number, 0)
            for name, bank in packed.items()
        }

    def operands(columns, diff, rest):
        """What a step has of its own, and what all share."""
        consts, carry, xs = join(diff, rest)
        return carry, (xs, jnp.moveaxis(columns, 1, 0), jnp.arange(layers)), consts

    def one(consts, carry, x, packed):
        """A layer as a function of what has gradients, and this."""
        x, weights, number = x
        diff_consts, rest_consts, join_consts = split_floating(consts)
        diff_x, rest_x, join_x = split_floating(x)

        def run(diff_consts, carry, diff_x, pulled):
            return layer(join_consts(diff_consts, rest_consts), carry, join_x(diff_x, rest_x), number, pulled)

        pulled = {name: mixer.pull(weights, bank) for name, bank in packed.items()}
        return run, (diff_consts, carry, diff_x, pulled)

    @jax.custom_vjp
    def call(columns, empty, diff, rest):
        carry, steps, consts = operands(columns, diff, rest)

        def step(state, x):
            carry, packed = state
            run, values = one(consts, carry, x, packed)
            carry, slots, y = run(*values)
            return (carry, write(packed, slots, x[-1])), y

        (carry, _), ys = jax.lax.scan(step, (carry, empty), steps)
        return carry, ys

    # How to put a layer's pull-back together. Tracing the forward pass tells, which comes before the backward pass.
    back: Any = None

    def call_forward(columns, empty, diff, rest):
        carry, steps, consts = operands(columns, diff, rest)

        def step(state, x):
            nonlocal back
            carry, packed = state
            run, values = one(consts, carry, x, packed)
            (carry, slots, y), pull = jax.vjp(run, *values)
            # What is there anyhow, weights above all, is not kept once more, nor what is soon had again from the bank.
            leaves, structure = jax.tree.flatten(pull)
            there = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves((consts, x, values[-1])))}
            back = structure, [there.get(id(leaf)) for leaf in leaves]
            kept = [leaf for leaf in leaves if id(leaf) not in there]
            return (carry, write(packed, slots, x[-1])), (y, kept)

        (carry, packed), (ys, kept) = jax.lax.scan(step, (carry, empty), steps)
        return (carry, ys), (columns, diff, rest, packed, kept)

    def call_backward(saved, cotangents):
        columns, diff, rest, packed, kept = saved
        d_carry, d_ys = cotangents
        _, steps, consts = operands(columns, diff, rest)
        structure, sources = back

        def step(state, x):
            d_carry, d_packed, d_consts = state
            x, kept, d_y, weights = x
            pulled = {name: mixer.pull(x[1], bank) for name, bank in packed.items()}  # weights of later slots are 0
            there, own = jax.tree.leaves((consts, x, pulled)), iter(kept)
            leaves = [next(own) if source is None else there[source] for source in sources]
            d_slots = {name: mixer.unpack(mixer.pull_back(weights, bank)) for name, bank in d_packed.items()}
            d_here, d_carry, d_x, d_pulled = jax.tree.unflatten(structure, leaves)((d_carry, d_slots, d_y))
            d_consts = jax.tree.map(jnp.add, d_consts, d_here)
            return (d_carry, write(d_packed, d_pulled, x[-1]), d_consts), d_x

        start = (d_carry, *jax.tree.map(jnp.zeros_like, (packed, split_floating(consts)[0])))
        (d_carry, d_packed, d_consts), d_xs = jax.lax.scan(step, start, (steps, kept, d_ys, columns), reverse=True)
        d_columns = sum(mixer.pull_weights(packed[name], d_packed[name]) for name in packed).astype(columns.dtype)
        return d_columns, None, jax.tree.leaves((d_consts, d_carry, d_xs)), None

    call.defvjp(call_forward, call_backward)
    carry, ys = call(columns, {name: jax.vmap(mixer.pack)(bank) for name, bank in banks.items()}, diff, rest)
    return carry, {}, ys


def _unrolled(mixer, body, consts, carry, xs, banks, remat, policy):
    first, per = mixer.first, mixer.per_layer
    parts = {name: [bank[:first]] for name, bank in banks.items()}
    outputs = []
    for number in range(_length(xs)):

        def run(consts, carry, x, parts, number=number):
            # A bank of exactly the slots that there are: nothing is computed for others.
            depths = {
                name: Depth(jnp.concatenate(part) if len(part) > 1 or first else None, first + number * per, number)
                for name, part in parts.items()
            }
            carry, slots, y = body(consts, carry, x, depths)
            return carry, {name: jnp.stack(slots[name]) for name in parts}, y

        if remat:
            run = jax.checkpoint(run, policy=policy)
        carry, slots, y = run(consts, carry, _take(xs, number), parts)
        parts = {name: [*part, slots[name]] for name, part in parts.items()}
        outputs.append(y)
    ys = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
    return carry, {name: jnp.concatenate(part) for name, part in parts.items()}, ys


def _write_once(mixer, body, consts, carry, xs, banks, rebuild):
    first, per = mixer.first, mixer.per_layer
    layers = _length(xs)
    diff, rest, join = split_floating((consts, carry, xs, banks))

    def run(consts, carry, x, number, banks):
        depths = {name: Depth(bank, first + number * per, number) for name, bank in banks.items()}
        carry, slots, y = body(consts, carry, x, depths)
        return carry, {name: jnp.stack(slots[name]) for name in banks}, y

    def write(banks, slots, number):
        return {
            name: jax.lax.dynamic_update_slice_in_dim(bank, slots[name], first + number * per, 0)
            for name, bank in banks.items()
        }

    def forward(diff, rest):
        consts, carry, xs, banks = join(diff, rest)

        def step(state, x):
            carry, banks = state
            x, number = x
            after, slots, y = run(consts, carry, x, number, banks)
            return (after, write(banks, slots, number)), (carry, y)

        (last, banks), (carries, ys) = jax.lax.scan(step, (carry, banks), (xs, jnp.arange(layers)))
        return (last, banks, ys), carries

    @jax.custom_vjp
    def call(diff, rest):
        return forward(diff, rest)[0]

    def call_forward(diff, rest):
        out, carries = forward(diff, rest)
        kept = {name: bank[:first] if name in rebuild else bank for name, bank in out[1].items()}
        return out, (diff, rest, carries, kept)

    def call_backward(saved, cotangents):
        diff, rest, carries, kept = saved
        consts, _, xs, empty = join(diff, rest)
        d_carry, d_banks, d_ys = cotangents
        banks = dict(kept)
        if rebuild:

            def slots_of(_, x):
                x, carry, number = x
                slots = run(consts, carry, x, number, empty)[1]
                return None, {name: slots[name] for name in rebuild}

            _, slots = jax.lax.scan(slots_of, None, (xs, carries, jnp.arange(layers)))
            for name in rebuild:
                rows = slots[name].reshape(layers * per, *slots[name].shape[2:])
                banks[name] = jnp.concatenate([kept[name], rows])
        diff_consts, rest_consts, join_consts = split_floating(consts)
        diff_xs, rest_xs, join_xs = split_floating(xs)

        def step(state, x):
            d_carry, d_banks, d_consts = state
            diff_x, rest_x, carry, number, d_y = x

            def layer(diff_consts, carry, diff_x, banks):
                return run(join_consts(diff_consts, rest_consts), carry, join_xs(diff_x, rest_x), number, banks)

            _, pull = jax.vjp(layer, diff_consts, carry, diff_x, banks)
            d_slots = {
                name: jax.lax.dynamic_slice_in_dim(d_bank, first + number * per, per)
                for name, d_bank in d_banks.items()
            }
            d_here, d_carry, d_x, d_read = pull((d_carry, d_slots, d_y))
            d_consts = jax.tree.map(jnp.add, d_consts, d_here)
            return (d_carry, jax.tree.map(jnp.add, d_banks, d_read), d_consts), d_x

        start = (d_carry, d_banks, jax.tree.map(jnp.zeros_like, diff_consts))
        steps = (diff_xs, rest_xs, carries, jnp.arange(layers), d_ys)
        (d_carry, d_banks, d_consts), d_xs = jax.lax.scan(step, start, steps, reverse=True)
        # The layers overwrite all slots but the first ones.
        d_banks = {name: d_bank.at[first:].set(0) for name, d_bank in d_banks.items()}
        return jax.tree.leaves((d_consts, d_carry, d_xs, d_banks)), None

    call.defvjp(call_forward, call_backward)
    return call(diff, rest)
