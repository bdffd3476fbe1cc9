"""Does a run depend on the number of processes? The same chains by torchrun with 1, 2 and 4 gloo processes.

    python -m benchmarks.processes [--chains fcpts,unipts] [--processes 1,2,4] [--out runs/processes]

For each chain: whether layers keep the same counts, how far weights are apart relative to the largest of their tensor,
test scores, and seconds, which on a machine of few cores say what sharing costs, not what it gains.
"""

from __future__ import annotations

STEPS = "{0}.training.steps"
CHAINS = {
    "erk + bn": ["--method", "erk", "--repair", "bn", "--budget", "sparsity=0.9"],
    "fcpts": ["--method", "fcpts", "--budget", "sparsity=0.9", "--set", "options.fcpts.training.steps=20"],
    "unipts": [
        "--method", "unipts", "--budget", "sparsity=0.9", "--set", "options.unipts.training.steps=20",
        "--set", "options.unipts-search.population=4", "--set", "options.unipts-search.generations=1",
    ],
    "dsa": [
        "--method", "dsa", "--budget", "macs=50%", "--set", "options.dsa.training.steps=20",
        "--set", "options.distill.training.steps=20",
    ],
    "pot": ["--method", "pot", "--budget", "sparsity=0.7", "--set", "options.layerwise.steps=20"],
    "sensitivity + lstsq": ["--allocate", "sensitivity", "--repair", "lstsq", "--pattern", "channels",
        "--score", "taylor", "--budget", "macs=60%", "--set", "options.sensitivity.rounds=3"],
    "knapsack + wanda": ["--allocate", "knapsack", "--score", "wanda", "--repair", "variance,bn",
        "--budget", "sparsity=0.8"],
}  # fmt: skip
