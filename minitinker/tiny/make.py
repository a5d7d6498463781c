"""Make the embedded base model: `python -m minitinker.tiny.make`.

A random base, LoRA of full rank on every linear, trained on the generated corpus through the API like any other
run, then merged. The first seed's model, rounded to bfloat16, is kept; all seeds stand in the README.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
from tqdm import tqdm

import minitinker
from minitinker import types
from minitinker.model.config import read_config, tensor_shapes
from minitinker.model.export import write_model
from minitinker.tiny import corpus
from minitinker.tiny.scaffold import CONFIG, write_config, write_tokenizer

HERE = Path(__file__).parent
STEPS = 8000
ROWS, ROW_TOKENS = 12, 96  # a step: rows of whole documents, at most so many tokens each
LEARNING_RATE, WARM_UP = 1e-2, 100  # then linearly to zero
HELD_OUT = 100  # documents per task


def main() -> None:
    """Train once per seed, keep the first model, write the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="where the model goes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first one's model is kept")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MINITINKER_HOME"] = temporary
        service = minitinker.ServiceClient()
        results = []
        for seed in args.seeds:
            base, merged = Path(temporary) / f"base-{seed}", Path(temporary) / f"model-{seed}"
            write_random_base(base, seed)
            trained = train(service, base, seed, args.steps)
            minitinker.merge(trained, merged, dtype="bfloat16")
            results.append(evaluate(service.create_sampling_client(base_model=str(merged))))
            if seed == args.seeds[0]:
                args.out.mkdir(parents=True, exist_ok=True)
                for file in merged.iterdir():
                    shutil.copyfile(file, args.out / file.name)
        (args.out / "README.md").write_text(readme(args.seeds, args.steps, results), encoding="utf-8")
        service.close()


def write_random_base(folder: Path, seed: int) -> None:
    """Linears of standard deviation 1 / sqrt(fan in), an embedding of 1, norms of exactly 1."""
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as temporary:
        scaffold = Path(temporary)
        write_config(scaffold)
        write_tokenizer(scaffold)
        tensors = {}
        for name, shape in tensor_shapes(read_config(scaffold)).items():
            if len(shape) == 1:
                tensors[name] = np.ones(shape, np.float32)
            else:
                deviation = 1.0 if "embed_tokens" in name else shape[1] ** -0.5
                tensors[name] = (random.standard_normal(shape) * deviation).astype(np.float32)
        write_model(folder, scaffold, tensors, "float32", tie_word_embeddings=False)


def train(service: minitinker.ServiceClient, base: Path, seed: int, steps: int) -> str:
    """Train an adapter of full rank on the corpus; returns the path of its weights."""
    client = service.create_lora_training_client(str(base), rank=CONFIG["hidden_size"], seed=seed)
    batches = training_batches(seed)
    with tqdm(range(steps), desc=f"seed {seed}", unit="step") as progress:
        for step in progress:
            rate = LEARNING_RATE * min(1, (step + 1) / WARM_UP) * (1 - step / steps)
            gradient = client.forward_backward(next(batches), "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=rate)).result()
            progress.set_postfix(loss=f"{gradient.result().loss:.3f}")
    return client.save_weights_for_sampler(f"tiny-{seed}").result().path


def training_batches(seed: int) -> Iterator[list[types.Datum]]:
    """Batches without end; their weights sum to 1, so the loss is a weighted mean."""
    documents = (corpus.encode(*document) for document in corpus.documents(Random(seed)))
    tokens, weights = next(documents)
    while True:
        rows: list[tuple[list[int], list[float]]] = []
        while len(rows) < ROWS:
            more_tokens, more_weights = next(documents)
            if len(tokens) + len(more_tokens) > ROW_TOKENS + 1:
                rows.append((tokens, weights))
                tokens, weights = [], []
            tokens, weights = tokens + more_tokens, weights + more_weights
        total = sum(sum(row_weights[1:]) for _, row_weights in rows)
        yield [
            types.Datum(
                types.ModelInput.from_ints(row_tokens[:-1]),
                {"target_tokens": row_tokens[1:], "weights": [w / total for w in row_weights[1:]]},
            )
            for row_tokens, row_weights in rows
        ]


def evaluate(client: minitinker.SamplingClient) -> dict[str, tuple[float, float]]:
    """Task -> (loss: nats per token of the answer, accuracy: exact match, greedy) on held-out prompts."""
    tokenizer = client.get_tokenizer()
    greedy = types.SamplingParams(temperature=0, max_tokens=64)
    random, scores = Random("held out"), {}
    for task in tqdm(corpus.TASKS, desc="held-out"):
        examples = [corpus.example(task, random, held_out=True) for _ in range(HELD_OUT)]
        asked = [types.ModelInput.from_ints(list(prompt.encode())) for prompt, _ in examples]
        whole = [types.ModelInput.from_ints(corpus.encode(*example)[0]) for example in examples]
        samples = [client.sample(prompt, 1, greedy) for prompt in asked]
        logprobs = [client.compute_logprobs(text) for text in whole]
        right = nats = tokens = 0.0
        for (_, answer), prompt, sample, lps in zip(examples, asked, samples, logprobs, strict=True):
            right += corpus.grade(answer, tokenizer.decode(sample.result().sequences[0].tokens))
            of_answer = [lp for lp in lps.result()[prompt.length :] if lp is not None]
            nats, tokens = nats - sum(of_answer), tokens + len(of_answer)
        scores[task] = (nats / tokens, right / len(examples))
    return scores


def readme(seeds: list[int], steps: int, results: list[dict[str, tuple[float, float]]]) -> str:
    """The model's README.md: what it is, and the table of what it can do."""
    random = Random("shown")
    lines = [
        "# minitinker/tiny",
        "",
        "A language model of 0.92 million parameters (1.8 MB in bfloat16) with the architecture of Qwen3, a byte-level",
        "tokenizer and a chat template. It knows one small world: tasks on words and numbers, generated from rules",
        "(`corpus.py`). It comes with the package, so that a first training run needs nothing else. Its weights are",
        "made from nothing by",
        "",
        f"    python -m minitinker.tiny.make --seeds {' '.join(map(str, seeds))} --steps {steps}",
        "",
        "which trains a LoRA of full rank on a random base, with this library, merges it, and writes this page. The",
        f"first seed's model is the one here. On {HELD_OUT} prompts of each task that the training never saw, for each",
        "seed: loss in nats per byte of the answer, and the share of answers that are right to the letter (greedy).",
        "",
        "| task | example | " + " | ".join(f"loss, seed {s} | right" for s in seeds) + " |",
        "|---|---|" + "---:|---:|" * len(seeds),
    ]
    for task in corpus.TASKS:
        prompt, answer = corpus.example(task, random, held_out=True)
        cells = " | ".join(f"{result[task][0]:.3f} | {result[task][1]:.2f}" for result in results)
        lines.append(f"| {task} | `{prompt.strip()}` → `{answer}` | {cells} |")
    means = [np.mean(list(result.values()), axis=0) for result in results]
    good = [sum(right >= 0.95 for _, right in result.values()) for result in results]
    cells = " | ".join(f"{loss:.3f} | {right:.2f}" for loss, right in means)
    lines.append(f"| **mean** | | {cells} |")
    lines.append(
        f"| **tasks of {len(corpus.TASKS)} at 0.95 or better** | | "
        + " | ".join(f" | {n}" for n in good)
        + " |"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
