"""launch.recaption against a local server: what is asked, written, kept and refused."""

import base64
import http.server
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

from cheapscale.data import chat
from cheapscale.data.sources import open_source
from cheapscale.data.tokens import tokeniser, train_vocabulary
from launch import recaption


@pytest.fixture
def pictures(tmp_path):
    """Four pictures of one colour each; the first one has a caption."""
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)
    for n in range(4):
        pixels = np.full((12, 20, 3), 60 * n, np.uint8)
        Image.fromarray(pixels).save(folder / "a" / f"{n}.png")
    (folder / "a" / "0.txt").write_text("a dark wall\n")
    return folder


@pytest.fixture
def server(monkeypatch):
    """(address, list of questions); a question whose picture's grey is in `fails` gets that state,
    once."""
    asked, fails = [], {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text, picture = body["messages"][0]["content"]
            png = base64.b64decode(picture["image_url"]["url"].partition("base64,")[2])
            with Image.open(io.BytesIO(png)) as image:
                size, grey = image.size, image.getpixel((0, 0))[0]
            asked.append((self.path, self.headers["Authorization"], body["model"], size, grey,
                          text["text"]))  # fmt: skip
            state = fails.pop(grey, 200)
            answer = {"choices": [{"message": {"content": f"A wall\nof grey {grey}."}}]}
            self.send_response(state)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    monkeypatch.setattr(chat.time, "sleep", lambda seconds: None)
    yield f"http://127.0.0.1:{found.server_port}/v1", asked, fails
    found.shutdown()
    found.server_close()


def run(folder, address, tmp_path, *words):
    return recaption.main([
        f"--data_dir={folder}", f"--url={address}", "--vision_model=tiny", "--side=16",
        "--parallel=2", f"--workdir={tmp_path / 'run'}", *words,
    ])  # fmt: skip


def test_every_picture_is_asked_about_once_and_training_mixes_both_captions(
    pictures, server, tmp_path
):
    address, asked, fails = server
    fails |= {60: 429, 120: 400}
    with pytest.raises(SystemExit, match="400.*run the same command again"):
        run(pictures, address, tmp_path)
    written = (pictures / "captions.jsonl").read_text().splitlines()
    assert len(written) == 3  # all but the refused one: 429 was repeated
    # A process that ends while it writes leaves a part of a line.
    (pictures / "captions.jsonl").write_text("\n".join([*written, '{"file_name": "a/2']))
    before = len(asked)
    summary = run(pictures, address, tmp_path)
    assert [question[4] for question in asked[before:]] == [120]
    assert summary["recaptioned"] == summary["num"] == 4
    path, key, model, size, _, text = asked[0]
    assert (path, key, model) == ("/v1/chat/completions", "Bearer sesame", "tiny")
    assert size == (16, 10)  # shrunk, with its proportions
    questions = {grey: text for *_, grey, text in asked}
    assert "a dark wall" in questions[0] and "described it" not in questions[60]

    shares = {}
    for share in (0.0, 0.25, 1.0):
        source = open_source(
            "folder", "all", resolution=8, data_dir=str(pictures), recaptioned=share
        )
        assert source.captions(0) == ("a dark wall", "A wall of grey 0.")
        vocabulary = train_vocabulary(source.captions(0), 300)
        source.use_captions(vocabulary, 24)
        raw = tokeniser(vocabulary, 24)(["a dark wall"])[0]
        rng, item = np.random.default_rng(0), source[0]
        drawn = [np.array_equal(source.reworded(item, rng)["label"], raw) for _ in range(400)]
        shares[share] = 1 - np.mean(drawn)
    assert shares[0.0] == 0 and shares[1.0] == 1 and abs(shares[0.25] - 0.25) < 0.07


@pytest.mark.parametrize("state, message", [(401, "401.*OPENAI_API_KEY"), (404, "404.*--url and")])
def test_refusals_name_their_remedy(pictures, server, tmp_path, state, message):
    address, _, fails = server
    fails |= dict.fromkeys((0, 60, 120, 180), state)
    with pytest.raises(SystemExit, match=message):
        run(pictures, address, tmp_path)
    with pytest.raises(SystemExit, match="is no address"):
        run(pictures, "localhost:8000", tmp_path)
