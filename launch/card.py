"""Cards of exported models: NAME.json beside NAME.safetensors, and the page of the shipped ones.

A card holds what the run recorded about itself and what commands measured; the commit and the
licence may be given where they are not recorded. No figure of a card is typed.
"""

import pathlib
from typing import Any

import numpy as np
from absl import logging

from cheapscale.data.files import atomic_write, read_json
from cheapscale.data.sources import open_data
from cheapscale.evaluation.image_sets import choice
from cheapscale.teacher.codec import factor_of
from cheapscale.teacher.experts import Experts
from cheapscale.teacher.teacher import Generator, Teacher
from cheapscale.training import exported
from cheapscale.training.cost import param_count
from cheapscale.training.exported import PREFIX, portable, sha256_of
from cheapscale.training.log import markdown
from configs.data_sets import DATA_SETS
from launch.evaluate import NO_METRICS

# What a card of a shipped model must tell, by section.
FACTS = {
    "": ("sha256", "bytes", "weights", "model", "resolution", "base", "picture", "figures"),
    "data": ("name", "split", "resolution", "fingerprint", "mean", "std", "origin", "licence"),
    "samples": ("num", "mean", "std", "float16_psnr"),
    "training": ("stage", "steps", "device_hours", "flops", "device", "commit", "config"),
}
KINDS = {Generator: "one-step generator", Teacher: "teacher", Experts: "set of experts"}
INTRO = """# Models that ship with cheapscale

Each is one file in float16, which every command takes in place of a work directory:

```bash
python -m launch.sample --model=pretrained:NAME --num=64
python -m launch.sample --model=pretrained:      # lists the names
```

In Python: `cheapscale.load("pretrained:NAME")`. `launch.export` writes the files, their cards
(NAME.json: SHA-256, data and licence, training, figures) and this page. Device hours and FLOPs
contain the earlier stages, from the teacher on. PSNR compares samples of the rounded weights with
those of the original ones for the same noise.
"""


def card_of(
    path: pathlib.Path,
    model: Teacher | Experts | Generator,
    *,
    samples: dict[str, float],
    figures: dict[str, dict],
    licence: str = "",
    commit: str = "",
) -> dict:
    """The card of the exported file `path`.

    samples: what `launch.export` finds in samples. figures: {network: {metric: value}}. licence,
    commit: where the table of data sets and the run have none. ValueError if a file of the
    package's folder lacks a fact.
    """
    meta = model.meta
    known = next((row for row in DATA_SETS.values() if row.name == meta["data"]["name"]), None)
    origin = known._asdict() if known else {"origin": "", "licence": ""}
    recorded = meta.get("provenance", {})
    if recorded.get("commit") not in (None, "unknown"):
        commit = recorded["commit"]
    card = {
        "file": path.name,
        "sha256": sha256_of(path),
        "bytes": path.stat().st_size,
        "weights": param_count(model.params),
        "model": KINDS[type(model)],
        "resolution": model.net.config.output_resolution * factor_of(meta),
        "base": model.resolution * factor_of(meta),
        "data": meta["data"]
        | moments_of_data(meta)
        | {"origin": origin["origin"], "licence": licence or origin["licence"]},
        "training": {
            "stage": meta["stage"],
            "steps": model.step,
            "device_hours": round(meta["ledger"]["device_seconds"] / 3600, 2),
            "flops": meta["ledger"]["flops"],
            "device": recorded.get("device", ""),
            "commit": commit,
            "frozen_networks": meta.get("frozen_networks", {}),
            "config": meta.get("config", {}),
        },
        "samples": samples,
        "picture": f"{path.stem}.png" if samples else "",
        "figures": figures,
    }
    if shipped(path) and (lacking := missing(card)):
        raise ValueError(
            f"the card of {path} lacks {', '.join(lacking)}: a shipped model needs them; give "
            "--licence, --commit, --num=32 or --figures=FILE"
        )
    return portable(card)


def moments(images: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation of the pixels of images in [-1, 1]."""
    images = np.asarray(images, np.float64)
    return {"mean": round(float(images.mean()), 4), "std": round(float(images.std()), 4)}


def moments_of_data(meta: dict) -> dict[str, float]:
    """The moments of at most 256 training images; {} if they are not on this machine."""
    data = meta.get("config", {}).get("data")
    try:
        source = open_data(data) if data else ()
    except (ValueError, OSError) as error:
        logging.warning("the card has no moments of the images: %s", error)
        source = ()
    return moments(source.read(choice(len(source), 256))[0]) if source else {}


def shipped(path: pathlib.Path) -> bool:
    """Whether a file lies in the package's folder of models."""
    return path.resolve().parent == exported.FOLDER.resolve()


def missing(card: dict) -> list[str]:
    """The facts that a card lacks."""
    return [
        f"{section}.{fact}".lstrip(".")
        for section, facts in FACTS.items()
        for fact in facts
        if (card.get(section, {}) if section else card).get(fact) in (None, "", {})
    ]


def read_figures(files: list[str], sha256: str, run: str) -> dict[str, dict]:
    """{network: {metric: value}} of results of launch.evaluate and launch.pipeline.

    sha256: of the exported file, which an evaluation must have measured. run: the folder of the
    exported run, whose row of a pipeline is taken, with the rows of the same size: its controls.
    """
    found: dict[str, dict] = {}
    for path in map(pathlib.Path, files):
        record, here = read_json(path), pathlib.Path(run).resolve()
        if "stages" in record and path.resolve().parent == here.parent:
            rows = record["stages"]
            side = rows[here.name if here.name in rows else "teacher"]["resolution"]
            found |= {k: numbers(row) for k, row in rows.items() if row["resolution"] == side}
        elif record.get("provenance", {}).get("files", {}).get("model") == sha256:
            found[path.parent.name] = numbers(record)
        else:
            raise ValueError(
                f"{path} does not measure this file, whose SHA-256 is {sha256}: give the "
                "evaluate.json of launch.evaluate --model=FILE.safetensors, or the pipeline.json "
                "beside the run"
            )
    return found


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The metrics among the values of a row."""
    return {k: v for k, v in row.items() if isinstance(v, float) and k not in NO_METRICS}


def page(cards: dict[str, dict]) -> str:
    """The Markdown page of the shipped models."""
    if not cards:
        return INTRO + "\nThis version ships none.\n"
    head = ("name", "model", "px", "data", "licence", "weights", "MB", "steps", "device hours",
            "PSNR of float16")  # fmt: skip
    rows = [head]
    for name, card in cards.items():
        data, training = card["data"], card["training"]
        rows.append((
            f"`{PREFIX}{name}`", card["model"], card["resolution"],
            f"[{data['name']}]({data['origin']})" if "://" in data["origin"] else data["name"],
            data["licence"], f"{card['weights']:,}", f"{card['bytes'] / 1e6:.1f}",
            training["steps"], training["device_hours"],
            f"{card['samples']['float16_psnr']:.0f} dB",
        ))  # fmt: skip
    total = sum(card["bytes"] for card in cards.values()) / 1e6
    parts = [INTRO, markdown(rows), f"{total:.1f} MB in all."]
    for name, card in cards.items():
        parts += [f"## {name}", f"![samples of {name}]({card['picture']})", facts(card)]
        if card["figures"]:
            parts.append(figures_table(card["figures"]))
    return "\n\n".join(parts) + "\n"


def facts(card: dict) -> str:
    """One sentence about the training, and the file's hash."""
    training, data = card["training"], card["data"]
    classes = ", ".join(data.get("class_names") or ())
    return (
        f"Stage {training['stage']} on {data['name']}:{data['split']} at {data['resolution']} px"
        f"{f' ({classes})' if classes else ''}, commit {training['commit']}, "
        f"{training['device']}, {training['flops']:.3g} FLOPs. SHA-256 `{card['sha256']}`."
    )


def figures_table(figures: dict[str, dict[str, float]]) -> str:
    """A row for each metric, a column for each network or control."""
    metrics = dict.fromkeys(metric for values in figures.values() for metric in values)
    cells = [
        (metric, *(f"{v[metric]:.4g}" if metric in v else "" for v in figures.values()))
        for metric in metrics
    ]
    return markdown([("metric", *figures), *cells])


def write_page(cards: dict[str, dict]) -> None:
    """Write the page of the shipped models."""
    with atomic_write(exported.FOLDER / "README.md") as temporary:
        temporary.write_text(page(cards))
