"""Stage `reward` after stage 2 on the demo's real images; docs/training.md has its table.

Stage 2 sees the answers about a quarter of the images, stage `reward` only rewards, about all.

python -m tests.train.reward_run [SEED ...] [--out FOLDER] [--steps N] [--rate R]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from moellava.train import load_recipe, train
from tests.train.three_stages import COMMON, run_three_stages


def reward_after(folder: Path, *, seed: int, steps: int, rate: float) -> dict[str, float]:
    """Held-out accuracies, 0..1, of the start and of the end; mean rewards of the first and last
    ten steps; seconds.
    """
    if not (folder / "stage2_tune" / "model").is_dir():
        run_three_stages(folder, seed=seed, num_stages=2)
    data = folder / "data"
    began = time.perf_counter()
    recipe = load_recipe(
        "stage4_reward",
        [
            *(word for word in COMMON if "group_by_length" not in word),
            f"seed={seed}",
            f"start_from={folder / 'stage2_tune'}",
            "after=tune",
            "trainable=[projector,language_model]",
            f"output_dir={folder / f'reward-{steps}-{rate}'}",
            f"data.train={data / 'conversations.json'}",
            f"data.images={data / 'images'}",
            f"data.evaluation={data / 'held_out.json'}",
            f"optim.max_steps={steps}",
            f"optim.learning_rate={rate}",
            "optim.batch_size=64",
            "optim.per_device_batch_size=64",
            "reward.max_new_tokens=8",
            "evaluation.scorers=[strict]",
            "evaluation.num_answers=0",
            "saving.every=1000",
        ],
    )
    log = train(recipe, show_progress=False).log
    scores = [entry["eval_strict_accuracy"] for entry in log if "eval_strict_accuracy" in entry]
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    return {
        "start": scores[0],
        "end": scores[-1],
        "first rewards": statistics.mean(rewards[:10]),
        "last rewards": statistics.mean(rewards[-10:]),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="keep the runs here")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=2e-4)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = (arguments.out or Path(scratch)) / str(seed)
            seen = reward_after(folder, seed=seed, steps=arguments.steps, rate=arguments.rate)
        print(seed, {name: round(value, 3) for name, value in seen.items()}, flush=True)


if __name__ == "__main__":
    main()
