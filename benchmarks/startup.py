"""Processor time of commands that need no torch, beside `python -c "import torch"`: the ratios, measured in turn.

python -m benchmarks.startup          five rounds
python -m benchmarks.startup --rounds 9
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

TORCH = [sys.executable, "-c", "import torch"]
COMMANDS = ("--help", "-h", "--version", "", "prune --help", "prnue", "prune --budgte", "prune --budget much")
MOST = 0.25  # of the processor time of `import torch`


def seconds(command: list[str]) -> float:
    """User and system seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ratios(rounds: int) -> tuple[float, dict[str, float]]:
    """(median seconds of `import torch`, command -> median of its seconds over those of the same round)."""
    taken: dict[str, list[float]] = {words: [] for words in COMMANDS}
    base = []
    for _ in range(rounds):
        base.append(seconds(TORCH))
        for words in COMMANDS:
            taken[words].append(seconds([sys.executable, "-m", "allot", *words.split()]) / base[-1])
    return statistics.median(base), {words: statistics.median(shares) for words, shares in taken.items()}


def main() -> None:
    """Print the ratios; exit code 1 where one is above `MOST`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    base, shares = ratios(parser.parse_args().rounds)
    lines = [f"import torch: {base:.2f} s of processor time"]
    lines += [f"{f'allot {words}'.strip():<28} {share:.2f} of it" for words, share in shares.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(max(shares.values()) > MOST)


if __name__ == "__main__":
    main()
