"""Write a captioned image folder of real photographs whose captions hide an imbalance.

Usage: python examples/real_photographs/prepare.py TRAIN.parquet OUTPUT
       python examples/real_photographs/prepare.py TEST.parquet OUTPUT --balanced

The parquet files hold CIFAR-10 photographs (Krizhevsky 2009) in the columns `image` and `label`. "a photo of a
vehicle" covers automobiles (90%) and trucks (10%), "a photo of an animal" horses (90%) and deer (10%). The
column `label` is for evaluation; neither audit nor training reads it.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path

from datasets import ClassLabel, load_dataset

CAPTION = {
    "automobile": "a photo of a vehicle",
    "truck": "a photo of a vehicle",
    "horse": "a photo of an animal",
    "deer": "a photo of an animal",
}
BIASED = {"automobile": 4500, "truck": 500, "horse": 4500, "deer": 500}
BALANCED = dict.fromkeys(BIASED, 1000)


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parquet", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--balanced", action="store_true", help="1,000 of each class, to fit an annotator")
    arguments = parser.parse_args()

    wanted = BALANCED if arguments.balanced else BIASED
    images = arguments.output / "images"
    images.mkdir(parents=True, exist_ok=True)
    taken: Counter[str] = Counter()
    rows = []
    data = load_dataset("parquet", data_files=str(arguments.parquet), split="train")
    names = data.features["label"]
    labels = names.int2str(data["label"]) if isinstance(names, ClassLabel) else data["label"]
    for index, label in enumerate(labels):
        if taken[label] >= wanted.get(label, 0):
            continue
        taken[label] += 1
        name = f"images/{index:05d}.png"
        data[index]["image"].save(arguments.output / name)
        rows.append({"file_name": name, "text": CAPTION[label], "label": label, "kind": CAPTION[label].split()[-1]})
    with (arguments.output / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["file_name", "text", "label", "kind"])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} photographs in {arguments.output}: {dict(taken)}")


if __name__ == "__main__":
    main()
