"""Whether methods that change a network fit it and each other: checked without torch.

Our agents ask before anything is built; `rewrite` asks again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ACTIVATIONS = ("crelu", "fourier")  # put their own nonlinearity in place
NORMS = ("layer-norm", "nap")
REWRITERS = ("simba", "crelu", "fourier", "layer-norm", "nap")  # in the order they are applied
HOMOGENEOUS = ("relu", "leaky-relu")  # phi(c x) = c phi(x) for c > 0


def check_together(names: Sequence[str]) -> None:
    """One line where two methods want the same place in a network.

    >>> check_together(["layer-norm", "crelu", "cbp"])
    """
    for group, what in ((ACTIVATIONS, "set the nonlinearity"), (NORMS, "normalise every layer")):
        both = [name for name in names if name in group]
        if len(both) > 1:
            raise ValueError(f"{both[0]} and {both[1]} both {what}; take one of the two")
    if "simba" in names:
        for name in names:
            if name in REWRITERS and name != "simba":
                raise ValueError(f"simba brings its own layers; leave {name} or simba out")


def check_network(
    methods: Mapping[str, Mapping[str, Any]], widths: Sequence[int], activation: str
) -> None:
    """One line where a method does not fit a multilayer perceptron.

    Args:
        methods: name -> parameters that were given.
        widths: units of the hidden layers, in order.
        activation: its nonlinearity, spelled as our agents do.

    >>> check_network({"crelu": {}}, (256, 128), "relu")
    """
    check_together(list(methods))
    for name in ACTIVATIONS:
        if name in methods and methods[name].get("width", "halve") == "halve":
            for width in widths:
                check_even(name, width)
    if "simba" in methods:
        check_equal(widths)
    if methods.get("nap", {}).get("gains") == "project" and "crelu" not in methods:
        check_homogeneous(activation if "fourier" not in methods else "fourier", HOMOGENEOUS)


def check_even(name: str, width: int) -> None:
    """A width that is to be halved must be even."""
    if width % 2:
        raise ValueError(
            f"{name} halves the width of every hidden layer and {width} is odd; take "
            f"{width + 1}, or {name}:width=keep"
        )


def check_equal(widths: Sequence[int]) -> None:
    """The residual stream of simba has one width."""
    if len(set(widths)) > 1:
        raise ValueError(
            f"simba has one width, and the hidden layers have {', '.join(map(str, widths))}; make "
            f"them equal"
        )


def check_homogeneous(activation: str, known: Sequence[str]) -> None:
    """Gains can be projected only where the nonlinearity passes a scale on."""
    if activation not in known:
        raise ValueError(
            f"nap:gains=project needs a nonlinearity that passes a scale on ({', '.join(known)}, "
            f"crelu), not {activation}; take gains=decay"
        )
