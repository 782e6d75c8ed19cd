"""All plasticity methods by name: what they are, who wrote them, their parameters.

Imports neither torch nor a method: a command is checked without them. A method's file is imported
by `make`. Classes take their defaults from here through `default`; a test compares the two.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perennial.plasticity.metric_names import METRICS as METRICS

if TYPE_CHECKING:
    from perennial.plasticity.base import Intervention

Value = bool | int | float | str


@dataclass(frozen=True)
class Param:
    """One parameter: its type is its default's. `low`, `high` are inclusive unless `open_low`."""

    default: Value
    help: str
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    choices: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """What is allowed, in words."""
        if self.choices:
            return " | ".join(self.choices)
        if isinstance(self.default, bool):
            return "true | false"
        if isinstance(self.default, str):
            return "a name"
        low = "" if self.low is None else f"{'>' if self.open_low else '>='} {self.low:g}"
        high = "" if self.high is None else f"<= {self.high:g}"
        return " and ".join(part for part in (low, high) if part) or "any number"

    def check(self, method: str, name: str, value: Any) -> Value:
        """The value as the parameter's type; one line for anything else."""
        wrong = ValueError(f"{method}: {name}={value} is not {self._kind()} ({self.range})")
        if self.choices:
            if value not in self.choices:
                raise ValueError(
                    f"{method}: {name}={value} is unknown{_nearest(str(value), self.choices)}"
                )
            return str(value)
        if isinstance(self.default, bool):
            words = {"true": True, "false": False}
            if isinstance(value, bool):
                return value
            if str(value).lower() not in words:
                raise wrong
            return words[str(value).lower()]
        if isinstance(self.default, str):
            return str(value)
        try:
            number = float(value.replace("_", "") if isinstance(value, str) else value)
        except (TypeError, ValueError):
            raise wrong from None
        if isinstance(value, bool) or not math.isfinite(number):
            raise wrong
        if self.low is not None and (number <= self.low if self.open_low else number < self.low):
            raise ValueError(f"{method}: {name}={value} must be {self.range}")
        if self.high is not None and number > self.high:
            raise ValueError(f"{method}: {name}={value} must be {self.range}")
        if isinstance(self.default, int):
            if number != int(number):
                raise wrong
            return int(number)
        return number

    def _kind(self) -> str:
        if isinstance(self.default, bool):
            return "a truth value"
        return "a whole number" if isinstance(self.default, int) else "a number"


@dataclass(frozen=True)
class Entry:
    """One method: where its class is, one line about it, its source, its parameters."""

    name: str
    module: str
    cls: str
    line: str
    paper: str
    params: Mapping[str, Param]


_NATURE = "Dohare et al. 2024, Nature 632 (arXiv 2306.13812)"
_MOMENTS = Param(
    "exact",
    "the optimizer's averages of new units: stepped as newborn, only zeroed, or kept",
    choices=("exact", "zero", "keep"),
)

_CHANGE = Param(False, "also when the host tells of a change")
_TIMES = Param(0, "at most so many per copy; 0: any number", 0)
_TARGET = Param("copy", "target networks become equal, or stay", choices=("copy", "keep"))


def _every(steps: int, what: str) -> Param:
    return Param(
        steps,
        f"optimizer steps between {what}, 0: none; under PPO a multiple of the steps per rollout",
        0,
    )


METHODS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "cbp",
            "continual_backprop",
            "ContinualBackprop",
            "continual backprop: a few least useful mature units start anew, every step",
            _NATURE,
            {
                "rate": Param(1e-4, "units replaced per eligible unit and step", 0.0, 1.0),
                "maturity": Param(10_000, "steps before a unit may be replaced", 0),
                "decay": Param(0.99, "of the running utility and mean activation", 0.0, 0.999999),
                "utility": Param(
                    "contribution",
                    "what a unit is worth",
                    choices=(
                        "contribution",
                        "mean-corrected",
                        "adaptable",
                        "adaptation",
                        "weight",
                        "random",
                    ),
                ),
                "reference": Param(
                    "exact",
                    "nature: as the published code (no bias compensation, Adam untouched, whole "
                    "part of the expected count only when it is 1 or more)",
                    choices=("exact", "nature"),
                ),
                "count": Param(
                    "bernoulli",
                    "fractional counts: a coin per step, or accumulated",
                    choices=("bernoulli", "accumulate"),
                ),
                "moments": Param(
                    "exact",
                    "Adam's averages of new units: stepped as newborn, or only zeroed",
                    choices=("exact", "zero"),
                ),
            },
        ),
        Entry(
            "redo",
            "redo",
            "ReDo",
            "recycles all dormant units (mean |activation| low in their layer) every so many steps",
            "Sokar et al. 2023, ICML (arXiv 2302.12902)",
            {
                "threshold": Param(
                    0.025, "share of the layer's average that is dormant; negative: never", -1.0
                ),
                "every": Param(1000, "optimizer steps between recyclings (published PPO: 100)", 1),
                "batches": Param(1, "last minibatches of a period whose activity counts", 1),
                "moments": _MOMENTS,
                "reference": Param(
                    "exact",
                    "paper: as Dopamine (Xavier redraw, averages zeroed); nature: as the published "
                    "PPO (Adam untouched, a layer of zeros left alone)",
                    choices=("exact", "paper", "nature"),
                ),
            },
        ),
        Entry(
            "snr",
            "snr",
            "SelfNormalizedResets",
            "self-normalised resets: a unit silent for longer than is usual for it starts anew",
            "Farias & Jozefiak 2025, ICLR (arXiv 2410.20098)",
            {
                "percentile": Param(
                    0.99, "of a unit's silences that a reset must reach; 1: never", 0.0, 1.0, True
                ),
                "initial": Param(1000, "silent optimizer steps that reset a unit, at first", 1),
                "every": Param(10_000, "optimizer steps between changes of that number", 1),
                "minimum": Param(1, "lower bound of that number", 1),
                "maximum": Param(100_000, "upper bound of that number", 1, 1_000_000),
                "check": Param(100, "steps between looks for units that are due (paper: 1)", 1),
                "moments": _MOMENTS,
            },
        ),
        Entry(
            "regrama",
            "regrama",
            "ReGraMa",
            "recycles units whose gradients are small in their layer, every so many steps",
            "Liu et al. 2025, NeurIPS (arXiv 2505.24061)",
            {
                "threshold": Param(
                    0.01, "share of the layer's average that is inactive; negative: never", -1.0
                ),
                "every": Param(1000, "optimizer steps between recyclings", 1),
                "batches": Param(10, "last minibatches of a period whose gradients count", 1),
                "moments": _MOMENTS,
            },
        ),
        Entry(
            "l2",
            "regularize",
            "L2",
            "coupled L2 penalty: strength times the weight joins its gradient",
            "Loshchilov & Hutter 2019 (arXiv 1711.05101); Nature 632",
            {
                "strength": Param(1e-3, "gradient per weight", 0.0),
                "scope": Param(
                    "all",
                    "all parameters of the optimizer (the published runs), or weight matrices only",
                    choices=("all", "weights"),
                ),
            },
        ),
        Entry(
            "weight-decay",
            "regularize",
            "WeightDecay",
            "decoupled weight decay: weights shrink by learning rate * strength, as in AdamW",
            "Loshchilov & Hutter 2019, ICLR (arXiv 1711.05101)",
            {
                "strength": Param(1e-2, "share per step, in learning rates", 0.0),
                "scope": Param(
                    "weights",
                    "weight matrices; biases of layers too; all parameters of the optimizer",
                    choices=("weights", "layers", "all"),
                ),
            },
        ),
        Entry(
            "l2-init",
            "l2_init",
            "L2Init",
            "pull towards the initial weights (regenerative regularisation)",
            "Kumar et al. 2024, CoLLAs (arXiv 2308.11958); W2: arXiv 2312.00246",
            {
                "strength": Param(1e-3, "gradient per distance from the initial weight", 0.0),
                "distance": Param(
                    "l2",
                    "squared; absolute; unsquared norm over all; squared in sorted order",
                    choices=("l2", "l1", "norm", "wasserstein"),
                ),
                "scope": Param(
                    "layers",
                    "weights and biases of layers; weight matrices; all of the optimizer",
                    choices=("layers", "weights", "all"),
                ),
                "decoupled": Param(False, "move the weights by learning rate * pull instead"),
                "average": Param(False, "divide each tensor's pull by its number of entries"),
                "resample": Param(False, "towards a fresh initial draw at each step"),
                "every": Param(100, "optimizer steps between sorts (wasserstein); 1: exact", 1),
            },
        ),
        Entry(
            "spectral",
            "spectral",
            "Spectral",
            "keeps every layer's largest singular value near 1, biases near 0",
            "Lewandowski et al. 2025, ICLR (arXiv 2406.06811)",
            {
                "strength": Param(1e-3, "of (sigma^exponent - 1)^2 per layer", 0.0),
                "exponent": Param(2.0, "of the singular value", 1.0),
                "biases": Param(True, "also |bias|^(2 exponent), and norms' gains to 1"),
            },
        ),
        Entry(
            "parseval",
            "parseval",
            "Parseval",
            "keeps the rows of hidden layers orthogonal and of equal length",
            "Chung et al. 2024, NeurIPS (arXiv 2412.07224)",
            {
                "strength": Param(1e-3, "of (64 / width)^2 |W W^T - scale I|^2 per layer", 0.0),
                "scale": Param(0.0, "squared row norm aimed at; 0: as in the initial weights", 0.0),
                "groups": Param(1, "rows are orthogonal within this many groups of rows", 1),
                "normalize": Param(False, "constrain angles only: rows divided by their norm"),
                "every": Param(16, "optimizer steps between gradients (held between); 1: exact", 1),
            },
        ),
        Entry(
            "infer",
            "infer",
            "InFeR",
            "initial feature regularisation: heads must predict those of the initial network",
            "Lyle et al. 2022, ICLR (arXiv 2204.09560)",
            {
                "strength": Param(5e-3, "of the squared error, summed over heads", 0.0),
                "heads": Param(10, "linear heads on the last hidden layer", 1),
                "scale": Param(100.0, "the initial heads' outputs are multiplied by this"),
                "every": Param(32, "optimizer steps between gradients (held between); 1: exact", 1),
            },
        ),
        Entry(
            "adam-equal-betas",
            "optimizers",
            "AdamEqualBetas",
            "Adam whose two averages forget equally fast: its step never exceeds the rate",
            "Dohare, Lan & Mahmood 2023 (EWRL), Overcoming policy collapse",
            {"beta": Param(0.99, "both betas", 0.0, 0.999999)},
        ),
        Entry(
            "layer-norm",
            "norms",
            "LayerNormalization",
            "layer norm before every nonlinearity (changes the network)",
            "Lyle et al. 2024 (arXiv 2402.18762); Ba et al. 2016 (arXiv 1607.06450)",
            {"affine": Param(True, "learn a gain and an offset per unit")},
        ),
        Entry(
            "crelu",
            "paired",
            "ConcatenatedReLU",
            "[relu(x), relu(-x)] as nonlinearity: no unit can die (changes the network)",
            "Abbas et al. 2023 (arXiv 2303.07507); Shang et al. 2016 (arXiv 1603.05201)",
            {
                "width": Param(
                    "halve",
                    "units of a layer: halve them to give as many features as before, or keep them",
                    choices=("halve", "keep"),
                ),
            },
        ),
        Entry(
            "fourier",
            "paired",
            "FourierFeatures",
            "[sin(x), cos(x)] as nonlinearity: deep Fourier features (changes the network)",
            "Lewandowski et al. 2025 (arXiv 2410.20634)",
            {
                "width": Param(
                    "halve",
                    "units of a layer: halve them to give as many features as before, or keep them",
                    choices=("halve", "keep"),
                ),
            },
        ),
        Entry(
            "nap",
            "projection",
            "NormalizeAndProject",
            "layer norms, and weights held at their initial norm (changes the network)",
            "Lyle et al. 2024 (arXiv 2407.01800)",
            {
                "gains": Param(
                    "decay",
                    "gains and offsets of the norms: pulled to 1 and 0, projected, or none",
                    choices=("decay", "project", "fixed"),
                ),
                "decay": Param(1e-3, "share of the way to 1 and 0 per projection", 0.0, 1.0),
                "every": Param(1, "optimizer steps between projections; 0: never", 0),
            },
        ),
        Entry(
            "weight-norm",
            "projection",
            "WeightNorm",
            "weight matrices are held at their initial Frobenius norm",
            "Lyle et al. 2024 (arXiv 2402.18762)",
            {
                "per": Param(
                    "layer",
                    "one norm per layer, or per unit's incoming weights",
                    choices=("layer", "unit"),
                ),
                "scope": Param(
                    "hidden", "hidden layers, or the output layers too", choices=("hidden", "all")
                ),
                "scale": Param(1.0, "times the initial norm", 0.0, open_low=True),
                "every": Param(1, "optimizer steps between projections; 0: never", 0),
            },
        ),
        Entry(
            "simba",
            "simba",
            "SimBa",
            "residual trunk with normalised branches, or on the unit sphere (changes the network)",
            "Lee et al. 2025 (arXiv 2410.09754); version 2: arXiv 2502.15280",
            {
                "version": Param(1, "1: SimBa, 2: SimbaV2", 1, 2),
                "blocks": Param(0, "residual blocks; 0: hidden layers less one, at least one", 0),
                "expansion": Param(4, "width inside a block, times the trunk's", 1),
            },
        ),
        Entry(
            "shrink-perturb",
            "shrink_perturb",
            "ShrinkPerturb",
            "weights shrink and fresh noise joins them, now and then or every step",
            "Ash & Adams 2020 (arXiv 1910.08475); D'Oro et al. 2023; arXiv 2305.19452, 2405.19153",
            {
                "shrink": Param(0.8, "factor of the weights", 0.0, 1.0),
                "noise": Param(0.2, "factor of the noise", 0.0),
                "every": _every(40_000, "events"),
                "change": _CHANGE,
                "times": _TIMES,
                "draw": Param(
                    "init",
                    "the noise: drawn as the layers were initialised, standard normal, or the "
                    "initial weights",
                    choices=("init", "normal", "initial"),
                ),
                "scope": Param(
                    "layers",
                    "weight matrices; biases of layers too; or all parameters",
                    choices=("weights", "layers", "all"),
                ),
                "head": Param(
                    "shrink",
                    "output layers do as the others, start anew, or stay",
                    choices=("shrink", "reset", "keep"),
                ),
                "adapt": Param(
                    "none",
                    "dormancy: shrink by 1 - 2 dormant fractions, at most to 0.2 and at least by "
                    "`shrink`",
                    choices=("none", "dormancy"),
                ),
                "optimizer": Param("keep", "its state at events", choices=("keep", "reset")),
            },
        ),
        Entry(
            "reset",
            "resets",
            "Reset",
            "all parameters and the optimizer start anew; for agents with a replay buffer",
            "Nikishin et al. 2022 (arXiv 2205.07802)",
            {
                "every": _every(200_000, "resets"),
                "change": _CHANGE,
                "times": _TIMES,
                "net": Param("all", "part of the model that is reset, by name"),
                "optimizer": Param("reset", "its state at resets", choices=("reset", "keep")),
                "target": _TARGET,
            },
        ),
        Entry(
            "head-reset",
            "resets",
            "HeadReset",
            "output layers start anew, features stay",
            "Nikishin et al. 2022 (arXiv 2205.07802); Nature 632",
            {
                "every": _every(40_000, "resets"),
                "change": _CHANGE,
                "times": _TIMES,
                "net": Param("all", "part of the model whose heads are reset, by name"),
                "depth": Param(1, "layers from the output back that make a head", 1),
                "to": Param("init", "drawn as at the start, or zero", choices=("init", "zero")),
                "optimizer": Param("reset", "its state of the head", choices=("reset", "keep")),
                "target": _TARGET,
            },
        ),
        Entry(
            "optimizer-reset",
            "resets",
            "OptimizerReset",
            "moments and step count of the optimizer start anew, weights stay",
            "Asadi et al. 2023 (arXiv 2306.17833); Adam-Rel: arXiv 2412.17113",
            {
                "every": _every(2560, "resets"),
                "change": _CHANGE,
                "times": _TIMES,
                "what": Param(
                    "all", "moments and step count, or the count alone", choices=("all", "step")
                ),
            },
        ),
        Entry(
            "injection",
            "injection",
            "PlasticityInjection",
            "the head freezes and a fresh one learns what to add, predictions unchanged",
            "Nikishin et al. 2023 (arXiv 2305.15555)",
            {
                "every": _every(200_000, "injections"),
                "change": _CHANGE,
                "times": Param(1, "at most so many; each adds two frozen heads", 1, 100),
                "depth": Param(2, "layers from the output back that make a head", 1),
                "net": Param("all", "part of the model whose heads are injected, by name"),
            },
        ),
        Entry(
            "hare-tortoise",
            "hare_tortoise",
            "HareTortoise",
            "now and then the network takes over the running average of its own weights",
            "Lee et al. 2024 (arXiv 2406.02596)",
            {
                "every": _every(16_000, "events"),
                "momentum": Param(0.999, "of the running average", 0.0, 1.0),
                "change": _CHANGE,
                "optimizer": Param("keep", "its state at events", choices=("keep", "reset")),
            },
        ),
    )
}


def default(method: str, parameter: str) -> Any:
    """A parameter's default, for the signature of the class."""
    return METHODS[method].params[parameter].default


def parse_spec(
    spec: str, known: Mapping[str, Entry] = METHODS, kind: str = "plasticity method"
) -> tuple[str, dict[str, Value]]:
    """`"cbp:rate=1e-4,maturity=10_000"` -> `("cbp", {"rate": 0.0001, "maturity": 10000})`.

    Raises:
        ValueError: one line; the nearest name for a typo, the range for a wrong value.
    """
    name, colon, rest = spec.strip().partition(":")
    name = name.strip()
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}{_nearest(name, known)}")
    given: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"{name}: cannot read {part!r}; write {name}:parameter=value,...")
        if key in given:
            raise ValueError(f"{name}: {key} is given twice")
        given[key] = value
    return name, check(name, given, known)


def check(
    name: str, given: Mapping[str, Any], known: Mapping[str, Entry] = METHODS
) -> dict[str, Value]:
    """Validated parameters of a known method."""
    params = known[name].params
    for key in given:
        if key not in params:
            raise ValueError(f"{name}: unknown parameter {key!r}{_nearest(key, params)}")
    return {key: params[key].check(name, key, value) for key, value in given.items()}


def make(spec: str) -> Intervention:
    """The method that a spec names: `make("cbp:rate=1e-3")`."""
    name, parameters = parse_spec(spec)
    entry = METHODS[name]
    module = importlib.import_module(f"perennial.plasticity.{entry.module}")
    made: Intervention = getattr(module, entry.cls)(**parameters)
    return made


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"
