"""Train the two further bases of benchmarks/audits.py: a world without bias, and a world of one prompt.

    python scripts/train_benchmark_bases.py [--work out/audits]

Both keep the bundled autoencoder; vocabulary, text encoder and UNet are trained from nothing, in about 12 and 9
minutes on one CPU core. Work is kept, so a stopped run goes on.
"""

import argparse
from pathlib import Path

from invdiff import ArchitectureConfig, FinetuneConfig, load_captioned_images
from invdiff.assets import BIRDS_MODEL
from invdiff.data.birds import BirdsWorld
from invdiff.data.encode import as_encoded
from invdiff.models.load import default_device, load_pipeline
from invdiff.training.finetune import SCRATCH_RATE, build_pipeline, save, train_denoiser

BASES = {
    "base-fair": (BirdsWorld(8000, severity=0.5, seed=50), 2000),
    "base-one-prompt": (BirdsWorld(6000, severity=0.85, seed=60, world="one-prompt"), 1500),
}


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/audits"))
    arguments = parser.parse_args()
    for name, (world, steps) in BASES.items():
        output = arguments.work / name
        if (output / "model_index.json").is_file():
            continue
        data = load_captioned_images(world.write(arguments.work / f"{name}-data"))
        pipe = build_pipeline(data.captions, ArchitectureConfig(), seed=7)
        pipe.register_modules(vae=load_pipeline(BIRDS_MODEL).vae)
        pipe.to(default_device())
        encoded = as_encoded(pipe, data, arguments.work / "cache")
        config = FinetuneConfig(steps=steps, learning_rate=SCRATCH_RATE, ema_decay=0.995, half_precision_weights=True)
        work, settings = arguments.work / f"{name}-work", config.to_dict() | {"data": encoded.data_fingerprint}
        train_denoiser(pipe, encoded, config, work, settings, train_text_encoder=True)
        save(pipe, output, half_precision=True)


if __name__ == "__main__":
    main()
