"""The last layers of a network: which they are, and parts of networks by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from perennial.plasticity.fresh import Slot
from perennial.plasticity.units import Layer, Site, Units


def head_layers(units: Units, owned: Iterable[Layer], depth: int = 1) -> list[Layer]:
    """Output layers among `owned`, and those that lead into them: `depth` layers of each path."""
    outputs = output_layers(units, owned)
    chosen = [layer for output in outputs for layer in layers_before(units, output, depth)]
    return list(dict.fromkeys(chosen))


def output_layers(units: Units, owned: Iterable[Layer]) -> list[Layer]:
    """Layers whose units no other layer reads."""
    read = {site.producer for site in units}
    return [layer for layer in owned if layer not in read]


def layers_before(units: Units, output: Layer, depth: int) -> list[Layer]:
    """An output layer and the layers before it, `depth` in all along each path."""
    found = last = [output]
    for _ in range(depth - 1):
        last = [site.producer for layer in last for site in feeders(units, layer)]
        found = list(dict.fromkeys([*found, *last]))
    return found


def feeders(units: Units, layer: Layer) -> list[Site]:
    """Sites whose units `layer` reads."""
    return [site for site in units if any(c.layer is layer for c in site.consumers)]


def of_net(method: str, slots: Sequence[Slot], units: Units, net: str) -> list[Slot]:
    """The parameters of one part of the model: its name, or any step of the path to it.

    Args:
        net: "all", or a name such as `policy`, `value_net`, `mlp_extractor.policy_net`.
    """
    if net == "all":
        return list(slots)
    nets = {layer.name: layer.net for layer in units.layers}
    found, known = [], set()
    for slot in slots:
        path = slot.name.rpartition(".")[0]
        parts = [part for part in path.split(".") if not part.isdigit()]
        names = {*parts, nets.get(path, ""), path, ".".join(parts)}
        known |= {*parts, nets.get(path, "")}
        if net in names or path.startswith(f"{net}."):
            found.append(slot)
    if not found:
        close = difflib.get_close_matches(net, known, 1, 0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        listed = ", ".join(sorted(known - {""}))
        raise ValueError(f"{method}: no part of the model is named {net!r}{hint} (known: {listed})")
    return found


def owned_layers(slots: Iterable[Slot]) -> list[Layer]:
    """Layers with a parameter among the slots, in order."""
    return list(dict.fromkeys(slot.layer for slot in slots if slot.layer is not None))


def head_slots(units: Units, slots: Sequence[Slot], depth: int) -> list[Slot]:
    """Parameters of the head: its layers', and those of norms between its layers."""
    head = head_layers(units, owned_layers(slots), depth)
    within = [site for site in units if site.producer in head]
    norms = {p for site in within for norm in site.norms for p in norm.parameters(recurse=False)}
    return [slot for slot in slots if slot.layer in head or slot.parameter in norms]
