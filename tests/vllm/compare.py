"""vLLM's answers against `generate`'s, in float32: tokens and top log-probabilities.

python tests/vllm/compare.py OUT KIND [--remote-code]    OUT is written by checkpoints.py
"""

import argparse
import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams

LARGEST_DIFFERENCE = 1e-4  # of a log-probability


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("kind")
    parser.add_argument("--remote-code", action="store_true", help="without moellava's plug-in")
    given = parser.parse_args()
    questions = json.loads((given.out / "questions.json").read_text())
    start = time.perf_counter()
    engine = LLM(
        str(given.out / (f"{given.kind}.remote" if given.remote_code else given.kind)),
        dtype="float32",
        trust_remote_code=given.remote_code,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=40,
        limit_mm_per_prompt={"image": questions["most_images"]},
        disable_log_stats=True,
    )
    started = time.perf_counter()
    expected = json.loads((given.out / "answers" / f"{given.kind}.json").read_text())
    sampling = SamplingParams(
        temperature=0, max_tokens=questions["new_tokens"], logprobs=questions["top"]
    )
    # All 40 at once: a batch of prompts with 0 to 3 images.
    outputs = engine.chat(questions["chats"], sampling, use_tqdm=False)
    equal, largest, prompts = 0, 0.0, 0
    for wanted, output in zip(expected, outputs, strict=True):
        answer = output.outputs[0]
        prompts += list(output.prompt_token_ids) == wanted["prompt"]
        equal += list(answer.token_ids) == wanted["tokens"]
        for top, logprobs in zip(wanted["top"], answer.logprobs, strict=False):
            differences = [
                abs(value - logprobs[int(token)].logprob)
                for token, value in top.items()
                if int(token) in logprobs
            ]
            largest = max(largest, *differences) if differences else float("inf")
    way = "remote code" if given.remote_code else "plug-in"
    print(
        f"RESULT | {given.kind} | {way} | {prompts}/40 | {equal}/40 | {largest:.1e} | "
        f"start {started - start:.0f} s, answers {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    if given.remote_code and "moellava" in sys.modules:
        raise SystemExit("The checkpoint's own code was to be run, but moellava was imported.")
    if (prompts, equal) != (40, 40) or largest > LARGEST_DIFFERENCE:
        raise SystemExit(f"{given.kind} by {way}: vLLM and generate differ.")


if __name__ == "__main__":
    main()
