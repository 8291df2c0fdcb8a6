"""Run by test_vllm.py: greedy tokens of several models in one process with vLLM. JSON in on stdin, out to a file.

In: a list of [directory, prompts, count]. Out: for each, for every prompt, the tokens and their log probabilities.
"""

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def greedy(directory: str, prompts: list[list[int]], count: int) -> list[tuple[list[int], list[float]]]:
    llm = LLM(
        directory,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=4,
        enforce_eager=True,
        kv_cache_memory_bytes=2**24,
    )
    wanted = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=1, detokenize=False)
    made = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)
    results = []
    for answer in (request.outputs[0] for request in made):
        tokens = list(answer.token_ids)
        results.append((tokens, [place[token].logprob for token, place in zip(tokens, answer.logprobs, strict=True)]))
    del llm
    gc.collect()
    return results


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps([greedy(*task) for task in json.load(sys.stdin)]))
