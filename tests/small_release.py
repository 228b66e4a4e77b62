"""A folder in the layout of 6DS with four facts in two splits, and images of one colour."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

# By id the words and the split; the ids have gaps and are not in the order of the splits
FACTS = {
    7: (("person", "", ""), 1),
    2: (("person", "riding", ""), 1),
    11: (("dog", "", ""), 2),
    4: (("person", "riding", "horse"), 2),
}
COLUMNS = ["image_links", "NLP_links", "SPO", "id", "w_s", "w_p", "w_o"]


def numbers_of(fact_id):
    """Six numbers for a fact, all different, also in absent slots."""
    return [fact_id + index / 8 for index in range(6)]


def write_csv(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def write_release(root, train=6, test=3):
    """Writes a release; every image has the colour (fact id, its number, 0 for train or 1 for test)."""
    (root / "NLP_feat/facts").mkdir(parents=True)
    rows = {(split, part): [] for split in (1, 2) for part in ("train", "test")}
    for fact_id, (words, split) in FACTS.items():
        (root / f"NLP_feat/facts/{fact_id}.txt").write_text("\n".join(map(str, numbers_of(fact_id))))
        for part, count in (("train", train), ("test", test)):
            for number in range(count):
                link = f"{part}/{fact_id}_{number}.jpg"
                path = root / "images" / Path(link).with_suffix(".png")
                path.parent.mkdir(parents=True, exist_ok=True)
                colour = np.full((4, 4, 3), [fact_id, number, part == "test"], dtype=np.uint8)
                Image.fromarray(colour).save(path)
                weights = [int(bool(word)) for word in words]
                rows[split, part].append([link, f"facts/{fact_id}.txt", f"<{','.join(words)}>", fact_id, *weights])
    for (split, part), lines in rows.items():
        write_csv(root / f"splits/2tasks_random/B{split}_{part}.csv", COLUMNS, lines)
    for split in (1, 2):
        lines = [[fact_id, sum(map(bool, words)), *words] for fact_id, (words, at) in FACTS.items() if at == split]
        write_csv(root / f"splits/2tasks_random/B{split}_facts.csv", ["id", "type", "S", "P", "O"], lines)
    return root
