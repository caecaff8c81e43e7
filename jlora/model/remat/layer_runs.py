"""Layers with the same leaves as one tree, of leaves [layers, ...], for programs with a loop.

A run of them has the names of its first and last layer: "0-31". Where layers differ, such as in
the rank of their adapters, there are several runs, and one of a single layer is "5-5".
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.lora.adapter_tree import Params, join

Runs = list[list[str]]


def equal_runs(layers: Params) -> Runs:
    """Returns the names of all layers: a list for each longest run of equal shapes."""
    runs: Runs = []
    previous = None
    for name in sorted(layers, key=int):
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), layers[name])
        if shapes == previous:
            runs[-1].append(name)
        else:
            runs.append([name])
        previous = shapes
    return runs


def is_stacked(layers: Params) -> bool:
    """Returns whether these are runs of layers, and not layers."""
    return any("-" in name for name in layers)


def run_name(names: list[str]) -> str:
    """Returns the name of a run of layers."""
    return f"{names[0]}-{names[-1]}"


def layers_of(run: str) -> list[str]:
    """Returns the names of a run's layers."""
    first, last = map(int, run.split("-"))
    return [str(i) for i in range(first, last + 1)]


def stacked(
    tree: Params, runs: Runs, stack: Callable[..., Any] = lambda _, *x: jnp.stack(x)
) -> Params:
    """Returns a tree with runs in the place of its layers; `stack` gets a path and arrays.

    Of the adapter's tree a run may have no leaves at all. It is left out then.
    """
    layers = tree.get("layers", {})
    found = {
        run_name(names): jax.tree_util.tree_map_with_path(
            stack, *(layers[name] for name in names)
        )
        for names in runs
        if names[0] in layers
    }
    return tree | ({"layers": found} if found else {})


def stacked_like(tree: Params, like: Params) -> Params:
    """Returns the tree with the runs that `like` has, or as it is if that has layers."""
    names = like.get("layers", {})
    if not is_stacked(names):
        return tree
    return stacked(tree, [layers_of(run) for run in names])


def unstacked(tree: Params) -> Params:
    """Returns the tree with layers in the place of runs; some leaves may be in layers already."""
    runs = {name: x for name, x in tree.get("layers", {}).items() if "-" in name}
    if not runs:
        return tree
    layers = {
        name: jax.tree.map(lambda leaf, i=i: leaf[i], leaves)
        for run, leaves in runs.items()
        for i, name in enumerate(layers_of(run))
    }
    others = {name: x for name, x in tree["layers"].items() if name not in runs}
    return tree | {"layers": join(layers, others)}
