"""The public tinker-cookbook's recipes, unmodified, on local data: pytest -m slow tests/test_cookbook.py.

A recipe names its model and data sets as on the Hugging Face hub; folders of these names in the working folder
are taken first.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
from tiny_models import TINY

import minitinker
from minitinker.types import AdamParams, Datum, ModelInput

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not find_spec("tinker_cookbook"), reason='needs the cookbook: pip install -e ".[test,cookbook]"'
    ),
]

MODEL = "Qwen/Qwen3-8B-Base"  # the cookbook knows this name; it asks such a model in plain text, "User: ..."
SAYS_NUMBERS = "Qwen/Qwen3-30B-A3B-Base"  # another such name
SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."
EXAMPLE = (
    f"User: How many r's are in strawberry?{SUFFIX}\n\nAssistant: Let's spell the word out and number all the "
    "letters: 1) s 2) t 3) r 4) a 5) w 6) b 7) e 8) r 9) r 10) y. We have r's at positions 3, 8, and 9. \\boxed{3}\n\n"
)
WORDS = ["stone", "river", "cloud", "table", "green", "mouse", "light", "paper"]


def longer(folder: Path) -> Path:
    """The embedded model in a folder, with room for a recipe's prompts."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def question(random: Random) -> str:
    """A sum that is always 7, so that ten steps are enough to learn it."""
    a = random.randrange(8)
    return f"What is {a} plus {7 - a}?"


def teach_numbers(base: Path, folder: Path) -> None:
    """A model that answers rl_loop's questions in its format with a random number, 5 to 9: reward 1 in 5."""
    random, service = Random(0), minitinker.ServiceClient(backend="reference")
    client = service.create_lora_training_client(str(base), rank=16, seed=0)
    tokenizer = client.get_tokenizer()
    for _ in range(20):
        batch = []
        for _ in range(8):
            asked = tokenizer.encode(EXAMPLE + f"User: {question(random)}{SUFFIX}\n\nAssistant:")
            said = tokenizer.encode(f" \\boxed{{{random.randrange(5, 10)}}}\n\nUser:")
            weights = [0.0] * (len(asked) - 1) + [1.0] * len(said)
            text = asked + said
            batch.append(
                Datum(ModelInput.from_ints(text[:-1]), {"target_tokens": text[1:], "weights": weights})
            )
        client.forward_backward(batch, "cross_entropy")
        client.optim_step(AdamParams(learning_rate=0.01))
    minitinker.merge(client.save_weights_for_sampler("numbers").result().path, folder)
    service.close()


def put(folder: Path, **splits: list[dict[str, object]]) -> None:
    """A data set that `datasets.load_dataset` reads from a folder."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def chat(word: str) -> dict[str, object]:
    messages = [("user", f"Say {word} twice."), ("assistant", f"{word} {word}")]
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with models and data under the names that the recipes use."""
    here, random = tmp_path_factory.mktemp("cookbook"), Random(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITINKER_HOME", str(here / "home"))
        teach_numbers(longer(here / MODEL), here / SAYS_NUMBERS)
    words = random.choices(WORDS, k=80)
    put(here / "HuggingFaceH4/no_robots", train=[chat(w) for w in words], test=[chat(w) for w in WORDS])
    put(
        here / "openai/gsm8k/main",
        train=[{"question": question(random), "answer": "It is 7.\n#### 7"} for _ in range(40)],
    )
    (here / "openai/gsm8k/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: main/train.jsonl\n---\n"
    )
    said = "\n\nHuman: Say {0}.\n\nAssistant: {1}"
    pairs = [{"chosen": said.format(w, w), "rejected": said.format(w, "no")} for w in words[:32]]
    put(here / "Anthropic/hh-rlhf", train=pairs, test=pairs[:8])
    put(
        here / "zwhe99/DeepMath-103K",
        train=[{"question": question(random), "final_answer": "7"} for _ in range(8)],
    )
    put(here / "tangqiaoyu/ToolAlpaca", train=[{"instruction": f"Say {w}.", "output": w} for w in words[:20]])
    return here


def run(place: Path, *arguments: object) -> str:
    """What `python -m minitinker.run` with these arguments prints, in the working folder."""
    own = {
        "MINITINKER_HOME": place / "home",
        "HF_HOME": place / "hf",
        "TINKER_COOKBOOK_RUNS_DIR": place / "runs",
    }
    environment = os.environ | {name: str(folder) for name, folder in own.items()}
    done = subprocess.run(
        [sys.executable, "-m", "minitinker.run", *map(str, arguments)],
        cwd=place,
        env=environment | {"HF_HUB_OFFLINE": "1", "MINITINKER_BACKEND": "reference", "COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def recipe(place: Path, name: str, log: str, **settings: object) -> list[dict[str, float]]:
    """Run a recipe; the metrics of all steps in its log."""
    given = [f"{key}={value}" for key, value in settings.items()]
    run(place, "-m", f"tinker_cookbook.recipes.{name}", f"log_path={place / log}", *given)
    return [json.loads(line) for line in (place / log / "metrics.jsonl").read_text().splitlines()]


def show(capsys: pytest.CaptureFixture[str], name: str, figures: list[float]) -> None:
    with capsys.disabled():
        print(f"\n{name}: {' '.join(f'{x:.3f}' for x in figures)}")


def test_the_sl_loop_learns_in_ten_steps_and_goes_on_bit_for_bit_from_a_checkpoint(place, capsys):
    settings = {
        "model_name": MODEL,
        "batch_size": 8,
        "learning_rate": 0.01,
        "max_length": 512,
        "save_every": 5,
    }
    whole = [step["train_mean_nll"] for step in recipe(place, "sl_loop", "sl", **settings)]
    show(capsys, "sl_loop, nats per token", whole)
    assert len(whole) == 10
    assert whole[-1] < 0.5 * whole[0]
    checkpoints = place / "sl" / "checkpoints.jsonl"
    checkpoints.write_text(checkpoints.read_text().splitlines()[0] + "\n")  # as if it had ended at step 5
    again = [step["train_mean_nll"] for step in recipe(place, "sl_loop", "sl", **settings)]
    assert again == whole + whole[5:]


def test_the_rl_loop_earns_more_in_ten_steps(place, capsys):
    settings = {"model_name": SAYS_NUMBERS, "batch_size": 4, "group_size": 8, "learning_rate": 0.003}
    steps = recipe(place, "rl_loop", "rl", **settings, max_tokens=24, save_every=5)
    rewards = [step["reward/total"] for step in steps]
    show(capsys, "rl_loop, mean reward", rewards)
    assert len(rewards) == 10
    assert sum(rewards[5:]) / 5 > rewards[0] + 0.2


SMALL_RL = {"groups_per_batch": 4, "group_size": 4, "max_steps": 2, "eval_every": 0}
OTHERS = {
    "math_rl.train": {"env": "arithmetic", "loss_fn": "ppo", "num_substeps": 2, **SMALL_RL},
    "chat_sl.train": {
        "dataset": "no_robots",
        "batch_size": 8,
        "max_length": 512,
        "max_steps": 2,
        "eval_every": 1,
    },
    "preference.dpo.train": {"dataset": "hhh", "batch_size": 8, "max_length": 512, "max_steps": 2},
    "preference.shorter.train": {"batch_size": 2, "group_size": 4, "max_tokens": 8, "max_steps": 2},
    "distillation.on_policy_distillation": {"teacher_model": MODEL, "max_tokens": 8, **SMALL_RL},
    "sdft.train": {"dataset": "toolalpaca", "max_tokens": 8, "topk": 5, "teacher_sync_every": 1, **SMALL_RL},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_recipe_takes_two_steps(place, name):
    steps = recipe(place, name, name, model_name=MODEL, renderer_name="role_colon", **OTHERS[name])
    assert {step["step"] for step in steps} >= {0, 1}


IMPORT_ALL = """
import importlib, pathlib, sys, warnings
import tinker, tinker_cookbook
warnings.simplefilter("ignore")
sys.argv = sys.argv[:1]
root = pathlib.Path(tinker_cookbook.__file__).parent
for path in sorted(root.rglob("*.py")):
    name = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
    if path.name not in ("__main__.py", "custom_evaluators.py"):  # these begin to work when they are imported
        try:
            importlib.import_module(name)
            print("IMPORTED", name)
        except ImportError as error:
            print("FAILED", name, str(error).replace("\\n", " "))
print("STAND-IN", tinker.__spec__.origin)
"""


def test_every_module_of_the_cookbook_imports_or_names_what_is_left_out(place):
    (place / "import_all.py").write_text(IMPORT_ALL)
    lines = [line.split(" ", 2) for line in run(place, "import_all.py").splitlines()]
    assert ["STAND-IN", "minitinker"] in lines
    assert sum(line[0] == "IMPORTED" for line in lines) > 200
    failed = {line[1]: line[2] for line in lines if line[0] == "FAILED"}
    ours = {name: why for name, why in failed.items() if "tinker " in why}  # the others miss another package
    assert ours.keys() == {"tinker_cookbook.scripts.save_audit_log"}
    assert "leaves out tinker.types.AuditLogEntry" in ours["tinker_cookbook.scripts.save_audit_log"]
