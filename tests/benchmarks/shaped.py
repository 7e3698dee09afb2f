"""Write a random model of one of the benchmarks' shapes, with the tokenizer of another, as a model's directory.

    python -m tests.benchmarks.shaped 0.5B models/shaped --tokenizer models/smollm2-135m

For benchmarks on machines that larger models fit; its texts mean nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from tests.benchmarks.common import SHAPES, language_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("to", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--context", type=int, default=2048)
    arguments = parser.parse_args()
    lm = language_model(arguments.shape, arguments.context)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    lm.config.bos_token_id, lm.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    lm.config.pad_token_id = tokenizer.pad_token_id
    lm.save_pretrained(arguments.to)
    tokenizer.save_pretrained(arguments.to)


if __name__ == "__main__":
    main()
