"""Methods that now and then replace units or weights: recycling, perturbation, resets."""

from __future__ import annotations

from perennial.plasticity.parameters import Entry, Param

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


EVENTS = (
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
