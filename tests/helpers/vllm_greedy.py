"""The program that test_vllm.py runs: greedy tokens of several models, in one process with vLLM.

Reads from stdin a JSON list of [directory, prompts, count]. Writes to the file in its argument, for every model and
every prompt, the tokens and their log-probabilities.
"""

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def greedy(directory: str, prompts: list[list[int]], count: int) -> list[tuple[list[int], list[float]]]:
    """Return the `count` tokens that vLLM appends to every prompt, and their log-probabilities."""
    llm = LLM(
        directory,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=4,
        enforce_eager=True,
        kv_cache_memory_bytes=2**24,
    )
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=1, detokenize=False)
    requests = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    results = []
    for output in (request.outputs[0] for request in requests):
        tokens = list(output.token_ids)
        logprobs = [choices[token].logprob for token, choices in zip(tokens, output.logprobs, strict=True)]
        results.append((tokens, logprobs))
    del llm
    gc.collect()
    return results


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps([greedy(*task) for task in json.load(sys.stdin)]))
