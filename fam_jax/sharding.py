"""Many devices: the mesh, and the rules that say which axis of which array is spread over which axis of the mesh.

What used to be `pjit` is `jax.jit` on arrays that are spread over a mesh. The model needs no second code for it:
arrays have named, *logical* axes, `ShardingRules` maps these to axes of the mesh that `jax.set_mesh` has set, and
`constrain` pins the layout of what is computed. Without a mesh, all of it does nothing.

    mesh = make_mesh(MeshConfig(fsdp=-1))
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(model.init, key, tokens)
        places = tree_shardings(config.sharding, mesh, shapes, shapes)
        variables = jax.jit(model.init, out_shardings=places)(key, tokens)
        out = jax.jit(model.apply)(variables, tokens)
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fam_jax.ops import WEIGHTS

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# Logical axes of every parameter; those of layers have a layer axis before them. Norm scales and what mixes layers
# are small: every device has all of them.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embed": ("vocab", "embed"),
    "unembed": ("embed", "vocab"),
    "fam_prompt": (None, "embed"),
    "fam_prefix": (None, None, "embed"),
    "final_norm": (None,),
    "attn_norm": (None,),
    "ff_norm": (None,),
    "q_norm": (None,),
    "k_norm": (None,),
    "wq": ("embed", "heads", None),
    "wk": ("embed", "kv_heads", None),
    "wv": ("embed", "kv_heads", None),
    "wo": ("heads", None, "embed"),
    "w_gate": ("embed", "mlp"),
    "w_up": ("embed", "mlp"),
    "w_down": ("mlp", "embed"),
    "bq": ("heads", None),
    "bk": ("kv_heads", None),
    "bv": ("kv_heads", None),
    "attn_post_norm": (None,),
    "ff_post_norm": (None,),
    "local": (),  # no parameter, but among them
}
# The two matrices that LoRA adds to a weight have its inputs and its outputs; their inner width is small.
for _name, (_inputs, _) in WEIGHTS.items():
    PARAMETERS[f"{_name}_a"] = (*PARAMETERS[_name][: len(_inputs)], None)
    PARAMETERS[f"{_name}_b"] = (None, *PARAMETERS[_name][len(_inputs) :])


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1, at one of them, is all that are left.

    Attributes:
        data: Copies of the model, each with its own rows of the batch. Slices of a pod that are joined by the data
            centre's network are apart along this axis, so it is a multiple of their number.
        fsdp: Rows of the batch, too; and every weight is spread over them, and put together where it is used.
        tensor: Heads, the feed-forward's hidden width and the vocabulary.
        sequence: Blocks of the text.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for axis in MESH_AXES:
            size = getattr(self, axis)
            if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size >= 1):
                raise ValueError(
                    f"MeshConfig.{axis}={size!r} is not allowed; it must be at least 1, or -1 for the rest"
                )
        if [getattr(self, axis) for axis in MESH_AXES].count(-1) > 1:
            raise ValueError(f"{self} is not allowed; only one axis can be -1, the devices that the others leave")

    def shape(self, devices: int) -> tuple[int, ...]:
        """Sizes of the axes on this many devices.

        Raises:
            ValueError: They do not come out.
        """
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and devices % known == 0:
            sizes[sizes.index(-1)] = devices // known
        if math.prod(sizes) != devices:
            raise ValueError(
                f"{self} does not fit {devices} devices: the product of its axes must be their number; set one axis "
                "to -1, or change it"
            )
        return tuple(sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh; its axes are MESH_AXES.

    Args:
        config: Its shape.
        devices: Default: all.

    Raises:
        ValueError: The shape does not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # Splitting: an axis of 4 in a torus of 8x8x8 is half of one of its rings.
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=types)
    if shape[0] % slices:
        raise ValueError(
            f"MeshConfig.data={shape[0]} is not a multiple of the {slices} slices, which are apart along this axis; "
            f"set data={slices}"
        )
    inside = (shape[0] // slices, *shape[1:])
    across = (slices, *[1] * (len(shape) - 1))
    placed = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=types)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Axes of the mesh over which each logical axis is spread; none is a copy on every device.

    Attributes:
        batch: Rows of a batch.
        block: Blocks of a text.
        embed: The model's width, in weights; activations have all of it.
        heads: Query heads.
        kv_heads: Key and value heads.
        mlp: Hidden width of the feed-forward.
        vocab: The vocabulary.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    block: tuple[str, ...] = ("sequence",)
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            if not isinstance(axes, tuple) or any(axis not in MESH_AXES for axis in axes):
                raise ValueError(
                    f"ShardingRules.{field.name}={axes!r} is not allowed; it must be a tuple of axes of the mesh: "
                    f"{', '.join(MESH_AXES)}"
                )
        activations = (("batch", "block", axis) for axis in ("heads", "kv_heads", "mlp", "vocab"))
        for axes in (*PARAMETERS.values(), *activations):
            self.spec(*axes)

    def spec(self, *axes: str | None) -> PartitionSpec:
        """How an array with these logical axes is spread; None is an axis without a name.

        Raises:
            ValueError: An axis is not known, or two are spread over the same axis of the mesh.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for axis in axes:
            if axis is not None and axis not in known:
                raise ValueError(f"logical axis {axis!r} is not known; there are {', '.join(known)}")
        spread = [() if axis is None else getattr(self, axis) for axis in axes]
        used = [axis for one in spread for axis in one]
        if doubled := sorted({axis for axis in used if used.count(axis) > 1}):
            raise ValueError(
                f"ShardingRules spread an array with the axes {axes} over {doubled[0]!r} of the mesh more than once; "
                f"give {' or '.join(axis for axis in axes if axis and doubled[0] in getattr(self, axis))} another"
            )
        return PartitionSpec(*(one or None for one in spread))


FSDP_TP = ShardingRules()
PRESETS = {
    "dp": ShardingRules(embed=(), heads=(), kv_heads=(), mlp=(), vocab=()),
    "fsdp": ShardingRules(heads=(), kv_heads=(), mlp=(), vocab=()),
    "fsdp_tp": FSDP_TP,
}


def fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """A spec without the axes that do not divide their side of `shape`, as one head is not cut in two.

    Axes of one device are left out, too, and those over which a `jax.shard_map` has spread the array already.

    Args:
        spec: How an array should be spread.
        shape: Its shape.
        mesh: A mesh, or an abstract one.

    Raises:
        ValueError: The mesh lacks an axis.
    """
    sizes = dict(mesh.shape)
    wanted = [(part,) if isinstance(part, str) else part or () for part in spec]
    if missing := [axis for part in wanted for axis in part if axis not in sizes]:
        raise ValueError(
            f"the mesh has the axes {', '.join(sizes)}, but not {missing[0]!r}, which the model's sharding rules name; "
            "make it with fam_jax.make_mesh, or give the rules its axes"
        )
    sizes |= {axis: 1 for axis, kind in zip(sizes, mesh.axis_types, strict=True) if kind is AxisType.Manual}
    parts = []
    for side, part in zip(shape, wanted, strict=True):
        kept: tuple[str, ...] = ()
        for axis in part:
            if sizes[axis] > 1 and side % math.prod(sizes[one] for one in (*kept, axis)) == 0:
                kept = (*kept, axis)
        parts.append(kept or None)
    return PartitionSpec(*parts)


def constrain(rules: ShardingRules, x: Array, *axes: str | None) -> Array:
    """`x` laid out by the rules over the mesh that is set; `x` as it is if there is none.

    Args:
        rules: The rules.
        x: Any array.
        axes: Logical names of its last axes; the ones before have none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            "the mesh has axes of type Explicit, which the model does not support; make it with fam_jax.make_mesh"
        )
    spec = rules.spec(*[None] * (x.ndim - len(axes)), *axes)
    return jax.lax.with_sharding_constraint(x, fit(spec, x.shape, mesh))


def gathers(rules: ShardingRules) -> bool:
    """Whether the mesh that is set spreads weights over devices that `gather` must put together."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return any(sizes.get(axis, 1) > 1 for axis in rules.embed)


def gather(rules: ShardingRules, params: Any, *, looped: bool = True) -> Any:
    """Weights of a layer, or the embedding, put together over `fsdp` before they are used more than once.

    XLA would gather them anew at every block of the FAM's scan. Their gradients are spread again.

    Args:
        rules: The rules.
        params: A mapping or dataclass of parameters without a layer axis, by their names.
        looped: A loop uses them. Then their gradients must be whole on every device until they are summed, because XLA
            would sum spread ones in every pass of the loop; otherwise no device need ever have all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return params

    def one(path: tuple, leaf: Array) -> Array:
        axes = _axes(path)
        if "embed" not in axes:
            return leaf
        return constrain(dataclasses.replace(rules, embed=()), leaf, *axes) if looped else _whole(rules, axes, leaf)

    return jax.tree_util.tree_map_with_path(one, params)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _whole(rules: ShardingRules, axes: tuple[str | None, ...], x: Array) -> Array:
    """`x` with these logical axes, put together over the width, its gradient spread as `x` is."""
    return constrain(dataclasses.replace(rules, embed=()), x, *axes)


def _whole_forward(rules: ShardingRules, axes: tuple[str | None, ...], x: Array) -> tuple[Array, None]:
    return _whole(rules, axes, x), None


def _whole_backward(rules: ShardingRules, axes: tuple[str | None, ...], _: None, d_x: Array) -> tuple[Array]:
    return (constrain(rules, d_x, *axes),)


_whole.defvjp(_whole_forward, _whole_backward)


def _names(path: tuple) -> list[str]:
    """Names on the way to a leaf, of keys and of fields."""
    found = [getattr(part, "key", getattr(part, "name", None)) for part in path]
    return [name for name in found if isinstance(name, str)]


def _axes(path: tuple) -> tuple[str | None, ...]:
    """Logical axes of the parameter at this path; empty for those that mix layers.

    Raises:
        ValueError: It is not in the table.
    """
    names = _names(path)
    if "mixing" in names:
        return ()
    if names[-1] not in PARAMETERS:
        raise ValueError(
            f"parameter {'/'.join(names)} has no logical axes; add them to PARAMETERS in fam_jax/sharding.py"
        )
    return (None,) * ("layers" in names) + PARAMETERS[names[-1]]


def tree_shardings(rules: ShardingRules, mesh: Mesh, tree: Any, params: Any = None) -> Any:
    """Where every array of a tree lives.

    Args:
        rules: The rules.
        mesh: The mesh.
        tree: Arrays or shapes: parameters; states that name their axes (`logical_axes`); anything with parts that look
            like the parameters, as an optimiser's state has. Everything else is on all devices.
        params: The parameters, or their shapes, if the tree is not they.

    Returns:
        A tree of `NamedSharding`.

    Raises:
        ValueError: A parameter is not in the table of logical axes.
    """
    params = tree if params is None else params
    known = {tuple(_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def place(leaf: Any, axes: Sequence[str | None]) -> NamedSharding:
        spec = rules.spec(*(axes or (None,) * len(leaf.shape)))
        return NamedSharding(mesh, fit(spec, leaf.shape, mesh))

    def one(path: tuple, leaf: Any) -> Any:
        if hasattr(leaf, "logical_axes"):
            named = ((name, getattr(leaf, name), axes) for name, axes in leaf.logical_axes.items())
            return dataclasses.replace(
                leaf, **{name: place(part, axes) for name, part, axes in named if part is not None}
            )
        names = tuple(_names(path))
        for start in range(len(names)):
            if names[start:] in known:
                return place(leaf, _left(_axes(path[-len(names[start:]) :]), known[names[start:]].shape, leaf.shape))
        return place(leaf, ())

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda x: hasattr(x, "logical_axes"))


def _left(axes: tuple[str | None, ...], shape: tuple[int, ...], now: tuple[int, ...]) -> tuple[str | None, ...]:
    """Of a parameter's logical axes those that are left in a statistic of it, from which one axis may be missing."""
    if now == shape:
        return axes
    for missing in range(len(shape)) if axes else ():
        if now == shape[:missing] + shape[missing + 1 :]:
            return axes[:missing] + axes[missing + 1 :]
    return ()


def table(rules: ShardingRules, mesh: Mesh, params: Any) -> str:
    """A line for every parameter: its shape, its logical axes, how it is spread, and its bytes on each device.

    Args:
        rules: The rules.
        mesh: The mesh.
        params: The parameters, or their shapes.
    """
    rows = [("parameter", "shape", "logical axes", "over", "bytes per device")]
    total = 0
    places = jax.tree.leaves(tree_shardings(rules, mesh, params, params))
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(params), places, strict=True):
        size = math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total += size
        axes = ", ".join(axis or "-" for axis in _axes(path) or (None,) * len(leaf.shape))
        over = ", ".join("x".join((part,) if isinstance(part, str) else part) if part else "-" for part in place.spec)
        rows.append(("/".join(_names(path)), str(list(leaf.shape)), axes, over, f"{size:,}"))
    rows.append(("all", "", "", "", f"{total:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"mesh: {sizes}", *lines])
