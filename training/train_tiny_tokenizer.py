"""Train the small byte-level tokenizer of the built-in backbones from the sentences beside this file.

The result is deterministic and shipped with the package, so this runs only when the sentences change.

Example: python training/train_tiny_tokenizer.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kuavo_smolvla_ros.policy.backbone_tokenizer import ASSET, TEXT_SPECIALS

CORPUS = Path(__file__).with_name("tiny_tokenizer_corpus.txt")
# More than the corpus has merges for: every word in it becomes one token, in each form in which it occurs.
VOCABULARY = 1200


def train(corpus: Path = CORPUS) -> Tokenizer:
    """Byte-level BPE with digits apart, like SmolVLM2's; any text can be encoded, byte by byte at worst."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=list(TEXT_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = corpus.read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator([line + "\n" for line in lines], trainer=trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=ASSET, help="default: the file shipped with the package"
    )
    args = parser.parse_args()
    tokenizer = train()
    args.output.write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    print(f"{args.output}: {tokenizer.get_vocab_size()} tokens, {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
