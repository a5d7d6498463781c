"""What the examples share besides the training: options, the final table, the picture of the curve."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def options(description: str | None, steps: int, learning_rate: float) -> argparse.Namespace:
    """The command line: --base-model, --steps, --learning-rate, --seed, --plot."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base-model", default="minitinker/tiny", help="any Llama, Qwen2 or Qwen3 (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of the curve")
    return parser.parse_args()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a head, the columns aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def plot(file: Path | None, values: Sequence[float], name: str) -> None:
    """Draw values over steps into a file, if there is one. Needs matplotlib (the extra `examples`)."""
    if file is None:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(values) + 1), values)
    axes.set(xlabel="step", ylabel=name)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    print(f"The curve is in {file}.")
