"""Write a second caption for every picture of a folder, by any OpenAI-compatible vision endpoint.

    export OPENAI_API_KEY=...      (leave it out for a local server that wants none)
    python -m launch.recaption --data_dir=DIR --split=train --vision_model=gpt-4o-mini \\
        --url=https://api.openai.com/v1 --workdir=runs/recaption

PaGoDA's text-to-image generator trains on captions and recaptions together (Kim et al. 2024, arXiv
2405.14822, section 4.2). The answers are appended to captions.jsonl in the split's folder, where a
teacher of captions finds them; --config.data.options.recaptioned says how often one is drawn. A
picture that has a recaption by the same model is not asked about again, so the same command
resumes. The last line is one JSON object.
"""

import base64
import concurrent.futures
import io
import json
import math
import pathlib
import threading
from typing import Any

from absl import flags
from PIL import Image

from cheapscale.data.chat import chat, check_address
from cheapscale.data.folders import CAPTIONS, FolderSource
from cheapscale.data.listing import below
from cheapscale.data.resize import open_rgb
from cheapscale.training import jobs
from cheapscale.training.stage import Job
from launch.command import execute, required, start

QUESTION = "Describe this image in one detailed sentence, without an introduction."
KNOWN = " Somebody described it as: {caption}"


def define() -> None:
    """The command's flags."""
    flags.DEFINE_string("data_dir", None, "Folder of the images.")
    flags.DEFINE_string("split", "all", "Its sub-folder; all: the folder itself. Also a slice.")
    flags.DEFINE_string("url", "https://api.openai.com/v1", "Address before /chat/completions.")
    flags.DEFINE_string("vision_model", None, "Name of the model at that address.")
    flags.DEFINE_string("question", QUESTION, "What is asked; a known caption is added to it.")
    flags.DEFINE_integer("side", 512, "Longest side in pixels of what is sent.", 16, 8192)
    flags.DEFINE_integer("max_tokens", 120, "Most tokens of an answer.", 1, 8192)
    flags.DEFINE_integer("parallel", 8, "Questions asked at once.", 1, 256)
    flags.DEFINE_integer("retries", 5, "How often a question is repeated, waiting longer.", 0, 100)
    flags.DEFINE_string("workdir", None, "Folder for the log and the summary.")
    required("data_dir", "pictures")
    required("vision_model", "gpt-4o-mini")
    required("workdir", "runs/recaption")


def build(given: Any) -> Job:
    """The job of the flags: shards of `parallel` pictures, in the order of the split."""
    check_address(given.url, "--url")
    source = FolderSource(
        given.split, 1, data_dir=given.data_dir, allow_upscale=True, probe=False, unlabelled=True
    )
    file, lock = source.root / CAPTIONS, threading.Lock()
    names = [below(source.path(i), source.root) for i in range(len(source))]
    have = {row["file_name"] for row in rows(file) if row.get("model") == given.vision_model}

    def records(shard: int) -> range:
        return range(len(names))[shard * given.parallel : (shard + 1) * given.parallel]

    def write(i: int) -> None:
        text = ask(given, source.path(i), source.caption(i))
        row = {"file_name": names[i], "text": text, "model": given.vision_model}
        with lock, file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        have.add(names[i])

    def run_shard(context: None, shard: int, mesh: Any) -> dict:
        todo = [i for i in records(shard) if names[i] not in have]
        with concurrent.futures.ThreadPoolExecutor(given.parallel) as pool:
            asked = [pool.submit(write, i) for i in todo]
        for one in asked:
            one.result()  # raises its error, after the other answers are written
        return {"asked": len(todo)}

    return Job(
        num_shards=math.ceil(len(names) / given.parallel),
        items_per_shard=given.parallel,
        prepare=lambda: mend(file),
        done=lambda shard: all(names[i] in have for i in records(shard)),
        run_shard=run_shard,
        finish=lambda _: {"captions": str(file), "num": len(names), "recaptioned": len(have)},
    )


def rows(file: pathlib.Path) -> list[dict]:
    """The lines of captions.jsonl, without a last one that is cut; see `folders.read_captions`."""
    lines = file.read_text("utf-8").split("\n") if file.is_file() else [""]
    return [json.loads(line) for line in lines[:-1] if line.strip()]


def mend(file: pathlib.Path) -> None:
    """Remove a last line that is cut, and end the file with a line's end, before lines are
    appended."""
    content = file.read_bytes() if file.is_file() else b""
    kept, _, last = content.rpartition(b"\n")
    if not last:
        return
    try:
        json.loads(last)
        file.write_bytes(content + b"\n")
    except ValueError:
        file.write_bytes(kept + b"\n" * bool(kept))


def ask(given: Any, path: pathlib.Path, caption: str) -> str:
    """The model's description of a picture, on one line."""
    picture = Image.fromarray(open_rgb(path))
    picture.thumbnail((given.side, given.side), Image.Resampling.LANCZOS)
    png = io.BytesIO()
    picture.save(png, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    question = given.question + (KNOWN.format(caption=caption) if caption else "")
    message = [
        {"type": "text", "text": question},
        {"type": "image_url", "image_url": {"url": address}},
    ]
    body = {
        "model": given.vision_model,
        "max_tokens": given.max_tokens,
        "messages": [{"role": "user", "content": message}],
    }
    remedy = (
        f"correct --url and --vision_model, and run the same command again for {path.name} and the "
        "rest, which keeps what is written"
    )
    return " ".join(chat(given.url, body, retries=given.retries, remedy=remedy).split())


def main(argv: list[str] | None = None) -> dict:
    """Recaption as the flags say; returns the summary."""

    def body(given) -> dict:
        asked = {name: given[name].value for name in ("data_dir", "split", "vision_model")}
        return execute(
            "recaption",
            given.workdir,
            lambda: jobs.run(build(given), given.workdir, asked, name="recaption"),
        )

    return start(define, body, argv)


if __name__ == "__main__":
    main()
