"""Plasticity: interventions that keep a network learning, and metrics that show when it stops."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perennial.plasticity.adam import BatchedAdam as BatchedAdam
    from perennial.plasticity.architecture import rewrite as rewrite
    from perennial.plasticity.base import Handle as Handle
    from perennial.plasticity.base import Intervention as Intervention
    from perennial.plasticity.base import Stage as Stage
    from perennial.plasticity.base import attach as attach
    from perennial.plasticity.continual_backprop import ContinualBackprop as ContinualBackprop
    from perennial.plasticity.copies import BatchedConv2d as BatchedConv2d
    from perennial.plasticity.copies import BatchedLinear as BatchedLinear
    from perennial.plasticity.copies import Init as Init
    from perennial.plasticity.hare_tortoise import HareTortoise as HareTortoise
    from perennial.plasticity.infer import InFeR as InFeR
    from perennial.plasticity.injection import PlasticityInjection as PlasticityInjection
    from perennial.plasticity.l2_init import L2Init as L2Init
    from perennial.plasticity.norms import BatchedLayerNorm as BatchedLayerNorm
    from perennial.plasticity.norms import LayerNormalization as LayerNormalization
    from perennial.plasticity.optimizers import AdamEqualBetas as AdamEqualBetas
    from perennial.plasticity.paired import ConcatenatedReLU as ConcatenatedReLU
    from perennial.plasticity.paired import FourierFeatures as FourierFeatures
    from perennial.plasticity.parseval import Parseval as Parseval
    from perennial.plasticity.probe import find_units as find_units
    from perennial.plasticity.projection import NormalizeAndProject as NormalizeAndProject
    from perennial.plasticity.projection import WeightNorm as WeightNorm
    from perennial.plasticity.redo import ReDo as ReDo
    from perennial.plasticity.registry import make as make
    from perennial.plasticity.registry import parse_spec as parse_spec
    from perennial.plasticity.regrama import ReGraMa as ReGraMa
    from perennial.plasticity.regularize import L2 as L2
    from perennial.plasticity.regularize import WeightDecay as WeightDecay
    from perennial.plasticity.resets import HeadReset as HeadReset
    from perennial.plasticity.resets import OptimizerReset as OptimizerReset
    from perennial.plasticity.resets import Reset as Reset
    from perennial.plasticity.scaling import PopArt as PopArt
    from perennial.plasticity.scaling import ReturnScale as ReturnScale
    from perennial.plasticity.shrink_perturb import ShrinkPerturb as ShrinkPerturb
    from perennial.plasticity.simba import SimBa as SimBa
    from perennial.plasticity.snr import SelfNormalizedResets as SelfNormalizedResets
    from perennial.plasticity.spectral import Spectral as Spectral
    from perennial.plasticity.units import Site as Site
    from perennial.plasticity.units import Units as Units

# name -> module: importing the package must not import torch (checking a command needs none)
_EXPORTS = {
    "AdamEqualBetas": "optimizers",
    "BatchedAdam": "adam",
    "BatchedLayerNorm": "norms",
    "BatchedConv2d": "copies",
    "BatchedLinear": "copies",
    "ConcatenatedReLU": "paired",
    "ContinualBackprop": "continual_backprop",
    "FourierFeatures": "paired",
    "Handle": "base",
    "HareTortoise": "hare_tortoise",
    "HeadReset": "resets",
    "InFeR": "infer",
    "Init": "copies",
    "Intervention": "base",
    "L2": "regularize",
    "L2Init": "l2_init",
    "LayerNormalization": "norms",
    "NormalizeAndProject": "projection",
    "OptimizerReset": "resets",
    "Parseval": "parseval",
    "PlasticityInjection": "injection",
    "PopArt": "scaling",
    "ReDo": "redo",
    "ReGraMa": "regrama",
    "Reset": "resets",
    "ReturnScale": "scaling",
    "SelfNormalizedResets": "snr",
    "ShrinkPerturb": "shrink_perturb",
    "SimBa": "simba",
    "Site": "units",
    "Spectral": "spectral",
    "Stage": "base",
    "Units": "units",
    "WeightDecay": "regularize",
    "WeightNorm": "projection",
    "attach": "base",
    "find_units": "probe",
    "make": "registry",
    "parse_spec": "registry",
    "rewrite": "architecture",
}
_MODULES = ("metrics", "registry", "values")

__all__ = [*_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        module = importlib.import_module(f"{__name__}.{_EXPORTS[name]}")
        return getattr(module, name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
