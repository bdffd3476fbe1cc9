"""Never run on ImageNet. The papers' tables: `python -m benchmarks.imagenet fcpts --train DIR --val DIR --out DIR`.

One command a table (fcpts, unipts, dsa, or a file of your own), and `cost` for what training costs. The same command
goes on where it was stopped. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.logging import RichHandler

from allot.errors import AllotError, Stopped, UsageError
from allot.processes import launched
from allot.run.driver import interruptible
from allot.run.store import write
from allot.sources.load import device_of
from benchmarks.imagenet import cells, cost, pages, recipes


def main(arguments: list[str] | None = None) -> int:
    """Run a table; the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    if given[:1] == ["cost"]:
        return cost.main(given[1:])
    options = _parser().parse_args(given)
    if launched():
        console.print("error: torchrun is not for these tables: start one command a GPU, each with --only of its own.")
        return UsageError.exit_code
    try:
        device_of(options.device)
        return _table(options)
    except Stopped as stopped:
        console.print(f"{stopped}: the same command goes on.", soft_wrap=True, markup=False)
        return stopped.exit_code
    except KeyboardInterrupt:  # the second one
        return Stopped.exit_code
    except AllotError as error:
        console.print(str(error), soft_wrap=True, markup=False)
        return error.exit_code


def _table(options: argparse.Namespace) -> int:
    table = recipes.load(options.table)
    chosen = recipes.cells(table, options.only, options.budgets, options.chains, options.seeds)
    small = recipes.Small(options.samples, options.batch, options.steps, options.image_size, tuple(options.set))
    name = Path(options.table).stem
    out = options.out / name
    if options.list:
        done = cells.read(cells.Setting(options.train, options.val, out))["cells"] if options.out else {}
        say = Console(soft_wrap=True, highlight=False).print
        for cell in chosen:
            recipes.parts(table, cell, small)
            say(f"{'done   ' if 'score' in done.get(cell.key, {}) else 'missing'} {cell.key}")
        return 0
    if not (options.train and options.val):
        raise UsageError("--train DIR and --val DIR, folders with one sub-folder a class, are needed.")
    setting = cells.Setting(
        options.train, options.val, out, options.weights, options.device, options.workers, options.score_every, small
    )

    def publish(found: dict[str, object]) -> None:
        write(out / f"{name}.md", pages.page(table, found, setting) + "\n")

    with interruptible() as should_stop:
        found = cells.run(table, chosen, setting, should_stop=should_stop, on_cell=publish)
    publish(found)
    logging.info("wrote %s and %s", out / f"{name}.md", setting.results)
    return 3 if any("error" in found["cells"][cell.key] for cell in chosen) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.imagenet",
        description=__doc__.splitlines()[0],
        epilog="`python -m benchmarks.imagenet cost --help`: what a whole training costs beside plain distillation.",
    )
    names = ", ".join(recipes.tables())
    parser.add_argument("table", help=f"{names}, or a YAML file like theirs")
    parser.add_argument("--train", type=Path, help="folder of training pictures, one sub-folder a class")
    parser.add_argument("--val", type=Path, help="folder of validation pictures, one sub-folder a class")
    parser.add_argument("--out", type=Path, default=Path("runs/imagenet"), help="[runs/imagenet]")
    for name in ("only", "budgets", "chains"):
        what = "nets" if name == "only" else name
        parser.add_argument(f"--{name}", default=(), type=_several, metavar="A,B", help=f"these {what} only")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ... [1]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--weights",
        metavar="FOLDER|random",
        help="folder with NET.safetensors, .pt or .pth  [what the recipe names, as torchvision and timm have it]",
    )
    parser.add_argument("--workers", type=int, default=8, help="threads that read pictures [8]")
    parser.add_argument("--score-every", type=int, default=1, metavar="N", help="score every N epochs [1]")
    parser.add_argument("--list", action="store_true", help="say which cells there are, and run none")
    small = parser.add_argument_group("for a try, whose page says that it is one")
    small.add_argument("--samples", type=int, help="calibration pictures")
    small.add_argument("--batch", type=int, help="pictures a step")
    small.add_argument("--steps", type=int, help="most steps of any training")
    small.add_argument("--image-size", type=int, help="height and width, of nets that take any")
    small.add_argument("--set", action="append", default=[], metavar="METHOD.OPTION=VALUE", help="where it is used")
    return parser


def _several(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
