"""The metrics in one line each; imports nothing, so that they can be listed without torch."""

from __future__ import annotations

METRICS: dict[str, str] = {
    "dormant_fraction": "share of units with mean |h| at most 0.025 of their layer's average",
    "dormant_fraction_0": "the same with threshold 0",
    "dormant_fraction_0.1": "the same with threshold 0.1",
    "dead_fraction": "share of units that are exactly 0 on every row",
    "saturated_fraction": "share of units on a flat end of their nonlinearity on 99 % of rows",
    "linearised_fraction": "share of units whose nonlinearity is a straight line on all rows",
    "duplicate_fraction": "share of units with another one at a cosine above 0.99; no silent ones",
    "effective_rank": "exp of the entropy of the features' normalised singular values",
    "srank": "fewest singular values with 99 % of their sum (the slippery-ant paper's stable rank)",
    "approximate_rank": "fewest singular values with 99 % of the sum of squares",
    "stable_rank": "squared Frobenius norm over the squared largest singular value",
    "participation_ratio": "squared sum of squared singular values over that of fourth powers",
    "feature_rank": "singular values of features / sqrt(rows) above 0.01",
    "feature_norm": "mean Euclidean norm of the features",
    "preactivation_drift": "distance (W2) of pre-activations from the first ones, mean over units",
    "weight_norm": "Frobenius norm of the weight matrix",
    "weight_magnitude": "mean |weight|, biases left out",
    "distance_to_init": "root mean squared distance of weights from the initial ones",
    "weight_change": "norm of the weights' change since the last measurement over their norm then",
    "gradient_norm": "L2 norm of the latest gradient of the weight matrix",
    "gradient_zero_fraction": "share of its entries that are exactly 0",
    "policy_entropy": "of the action distribution, in nats; only where there is one",
}
