"""Methods at work all the time: penalties, the optimizer, the architecture."""

from __future__ import annotations

from perennial.plasticity.parameters import Entry, Param

_NATURE = "Dohare et al. 2024, Nature 632 (arXiv 2306.13812)"

TRAINING = (
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
            "every": Param(4, "optimizer steps between gradients (held between); 1: exact", 1),
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
            "every": Param(32, "optimizer steps between gradients (held between); 1: exact", 1),
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
            "every": Param(64, "optimizer steps between gradients (held between); 1: exact", 1),
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
)
