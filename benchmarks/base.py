"""Train an unbiased base of 64 pixels like the one that benchmarks fine-tune: faces, scenes, birds on balanced scenes.

    python benchmarks/base.py --data SOURCE --base MODEL --output OUT

Autoencoder, text encoder and shape of the denoiser are those of MODEL, a pipeline's folder; the denoiser's weights are
new. It is `invdiff finetune --fresh-denoiser` on the folder that worlds.everything writes: latents are kept, a tenth
of the captions is empty, weights are averaged, the rate falls on a cosine, a stopped run goes on. A GPU is used where
there is one; one CPU core takes about a day.
"""

from pathlib import Path

import torch
import worlds
from kept import parser_of

from invdiff import FinetuneConfig, finetune, load_captioned_images


def main() -> None:
    """Write the images and train."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of public images in parquet files")
    parser.add_argument("--base", type=Path, required=True, help="the pipeline whose shape and autoencoder are taken")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the new pipeline")
    parser.add_argument("--birds", type=int, default=14_000, help="composed birds (%(default)s)")
    parser.add_argument("--steps", type=int, default=20_000, help="optimiser steps (%(default)s)")
    batch_size = 512 if torch.cuda.is_available() else 64
    parser.add_argument("--batch-size", type=int, default=batch_size, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    arguments = parser.parse_args()
    folder = arguments.output.with_name(f"{arguments.output.name}-images")
    worlds.everything(arguments.data, folder, num_birds=arguments.birds)
    config = FinetuneConfig(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=1e-3,
        ema_decay=0.999,
        fresh_denoiser=True,
        half_precision_weights=True,
        seed=arguments.seed,
    )
    finetune(load_captioned_images(folder), arguments.output, base=arguments.base, config=config)


if __name__ == "__main__":
    main()
