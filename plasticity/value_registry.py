"""All value losses by name, and how a spec like `hl-gauss:low=0,high=500` reads. No torch here."""

from __future__ import annotations

from typing import Any

from perennial.plasticity.registry import Entry, Param, Value
from perennial.plasticity.registry import parse_spec as _parse

_C51 = "Bellemare, Dabney & Munos 2017 (arXiv 1707.06887)"
_STOP = "Farebrother et al. 2024, ICML (arXiv 2403.03950)"
_SYMLOG = "the support is of sign(y) log(1 + |y|): wide ranges, coded values below their mean"


def _support(low: float, high: float, bins: int) -> dict[str, Param]:
    return {
        "low": Param(low, "lower end of the support; smaller targets are clipped"),
        "high": Param(high, "upper end of the support; larger targets are clipped"),
        "bins": Param(bins, "network outputs per value", 2),
    }


VALUES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("mse", "values", "MSE", "the value itself, squared error", "", {}),
        Entry(
            "two-hot",
            "values",
            "TwoHot",
            "probabilities over centres, the two nearest share a target; cross-entropy",
            "Hafner et al. 2023, DreamerV3 (arXiv 2301.04104); Imani & White 2018",
            {**_support(-20.0, 20.0, 255), "symlog": Param(True, _SYMLOG)},
        ),
        Entry(
            "hl-gauss",
            "values",
            "HLGauss",
            "probabilities over bins, a target is a Gaussian histogram; cross-entropy",
            f"Imani & White 2018 (arXiv 1806.04613); {_STOP}",
            {
                **_support(-10.0, 10.0, 51),
                "width": Param(0.75, "standard deviation of a target, in bins", 0.0, open_low=True),
                "symlog": Param(False, _SYMLOG),
            },
        ),
        Entry(
            "c51",
            "values",
            "C51",
            "probabilities over atoms; targets are projected distributions; cross-entropy",
            _C51,
            _support(-10.0, 10.0, 51),
        ),
        Entry(
            "quantile",
            "values",
            "Quantile",
            "quantiles of the return, unbounded; quantile Huber loss",
            "Dabney et al. 2018, AAAI (arXiv 1710.10044)",
            {
                "quantiles": Param(200, "network outputs per value", 1),
                "kappa": Param(1.0, "where Huber's loss turns linear", 0.0, open_low=True),
            },
        ),
    )
}


def default(codec: str, parameter: str) -> Any:
    """A parameter's default, for the signature of the class."""
    return VALUES[codec].params[parameter].default


def parse_spec(spec: str) -> tuple[str, dict[str, Value]]:
    """`"hl-gauss:low=0,high=500"` -> `("hl-gauss", {"low": 0.0, "high": 500.0})`.

    Raises:
        ValueError: one line; the nearest name for a typo, the range for a wrong value.
    """
    name, given = _parse(spec, VALUES, "value loss")
    check_support(name, given)
    return name, given


def check_support(name: str, given: dict[str, Any]) -> None:
    """One line where the support is empty."""
    if "low" in VALUES[name].params:
        low, high = (given.get(key, default(name, key)) for key in ("low", "high"))
        if not low < high:
            raise ValueError(f"{name}: low={low:g} must be below high={high:g}")
