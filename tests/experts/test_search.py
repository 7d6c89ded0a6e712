"""The search under a budget: tolerance, memory, resuming, and a language model over HTTP."""

import functools
import http.server
import json
import threading

import numpy as np
import pytest

from cheapscale.data import chat
from cheapscale.experts import search
from cheapscale.experts.language_model import LanguageModel, checked, prompt
from cheapscale.experts.structure import variables
from cheapscale.models.unet import unet

FIELDS = dict(resolution=16, channels=32, channel_mult=(1, 2), num_blocks=1, attention=(8,))


@functools.cache
def task(target=0.7):
    config = unet(**FIELDS).config
    rng = np.random.default_rng(0)
    scores = {name: rng.exponential(size=v.width) for name, v in variables(config).items()}
    return search.make_task(config, target, scores)


def score(widths):
    """An artificial loss that depends strongly on the encoder's width, weakly on the decoder's."""
    known = task().variables
    return sum(
        (5.0 if name.startswith("enc") else 0.2) * (1 - width / known[name].width) ** 2
        for name, width in widths.items()
    )


@pytest.mark.parametrize("target", [0.6, 0.9])
def test_every_start_is_moved_to_the_target(target):
    here, rng = task(target), np.random.default_rng(1)
    for widths in (
        search.uniform(here),
        search.move_to_target(here, search.random_widths(here, rng)),
    ):
        assert abs(here.share(widths) - target) <= search.TOLERANCE
        assert all(width in here.menus[name] for name, width in widths.items())
        kept = here.keep(widths)
        assert {name: len(channels) for name, channels in kept.items()} == widths


def test_candidates_of_all_proposers_have_equal_flops():
    """Candidates are compared at equal FLOPs, not at the upper end of the tolerance."""
    here, rng = task(0.7), np.random.default_rng(2)
    found = [search.move_to_target(here, search.random_widths(here, rng)) for _ in range(8)]
    found.append(search.uniform(here))
    shares = [here.share(widths) for widths in found]
    assert np.abs(np.array(shares) - 0.7).max() < 0.005 < search.TOLERANCE
    for widths in found:  # no single step is closer to the target
        apart = abs(here.share(widths) - 0.7)
        for name, menu in here.menus.items():
            for other in menu:
                if abs(menu.index(other) - menu.index(widths[name])) == 1:
                    assert abs(here.share(widths | {name: other}) - 0.7) >= apart


def test_a_swap_moves_two_variables_one_step_each_way():
    here, rng = task(), np.random.default_rng(0)
    for _ in range(50):
        start = search.random_widths(here, rng)
        after = search.swapped(here, start, rng)
        steps = [here.menus[n].index(after[n]) - here.menus[n].index(start[n]) for n in start]
        assert sorted(step for step in steps if step) == [-1, 1]


def test_uniform_widths_do_not_depend_on_the_scores():
    """So criteria of importance can be compared at equal widths."""
    here = task()
    other = here._replace(scores={name: row[::-1] ** 3 for name, row in here.scores.items()})
    assert search.uniform(here) == search.uniform(other)
    starts = [search.random_widths(here, np.random.default_rng(i)) for i in range(4)]
    moved = [[search.move_to_target(t, start) for start in starts] for t in (here, other)]
    assert moved[0] != moved[1]  # while the steps of the search depend on the scores


def test_a_guided_swap_exchanges_the_least_important_channels_for_more_important_ones():
    here, start = task(), search.uniform(task())
    moved = search.guided(here, start)
    change = {n: here.menus[n].index(moved[n]) - here.menus[n].index(start[n]) for n in start}
    (down,) = (name for name, step in change.items() if step == -1)
    (up,) = (name for name, step in change.items() if step == 1)

    def price(name, step):
        i = here.menus[name].index(start[name]) + step
        if not 0 <= i < len(here.menus[name]):
            return np.inf
        width = here.menus[name][i]
        saved = here.share(start) - here.share(start | {name: width})
        return (here.lost(name, width) - here.lost(name, start[name])) / abs(saved)

    assert price(down, -1) == min(price(name, -1) for name in start)
    assert price(up, 1) == min(price(name, 1) for name in start if name != down)


def test_a_target_out_of_reach_is_refused():
    config = unet(**FIELDS).config
    with pytest.raises(ValueError, match="budget is 0.050 of .* raise --config.prune.k or"):
        search.make_task(config, 0.05, task().scores)


def test_kept_channels_are_those_of_highest_score():
    here = task()
    name = next(iter(here.variables))
    variable, width = here.variables[name], here.menus[name][0]
    kept = here.keep({name: width})[name]
    cells = np.asarray(here.scores[name]).reshape(variable.cells, -1)
    best = cells.argmax(1) + np.arange(variable.cells) * cells.shape[1]
    if width == variable.cells:
        np.testing.assert_array_equal(kept, best)
    assert here.lost(name, variable.width) == 0
    assert here.lost(name, width) == pytest.approx(
        here.scores[name].sum() - here.scores[name][kept].sum()
    )


def run(tmp_path, proposer, **options):
    options = {"rounds": 5, "per_round": 4} | options
    return search.search(task(), score, proposer, memory_path=tmp_path / "memory.jsonl", **options)


def test_searching_improves_on_one_ratio_for_all(tmp_path):
    best, memory = run(tmp_path, search.Greedy(), rounds=8)
    start = score(search.uniform(task()))
    assert memory[0].score == pytest.approx(start) and best.score < 0.9 * start
    assert len({tuple(entry.widths.items()) for entry in memory}) == len(memory)
    assert all(task().fits(entry.share) for entry in memory)


def test_an_interrupted_search_continues_from_its_memory(tmp_path):
    whole, memory = run(tmp_path / "whole", search.Greedy())
    run(tmp_path / "parts", search.Greedy(), rounds=2)
    again, resumed = run(tmp_path / "parts", search.Greedy())
    assert resumed == memory and again == whole
    lines = (tmp_path / "parts" / "memory.jsonl").read_text().splitlines()
    assert len(lines) == len(memory) + 5 and json.loads(lines[0])["round"] == 0
    # if the writer is killed during the last round, that round runs again with the same result
    path = tmp_path / "parts" / "memory.jsonl"
    path.write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:20])
    assert run(tmp_path / "parts", search.Greedy()) == (whole, memory)
    with pytest.raises(ValueError, match="another network or budget"):
        search.read_memory(tmp_path / "parts" / "memory.jsonl", task(0.9))


def test_without_memory_every_round_starts_anew(tmp_path):
    """The paper's ablation: the proposer sees no memory, but the search still avoids repetition."""
    shown = []

    class Watched(search.Greedy):
        def propose(self, task, memory, count, rng):
            shown.append(len(memory))
            return super().propose(task, memory, count, rng)

    _, memory = run(tmp_path, Watched(), remember=False)
    assert set(shown) == {0} and len(memory) > 5
    keys = [tuple(sorted(entry.widths.items())) for entry in memory]
    assert len(set(keys)) == len(keys)
    forgotten = len(shown)
    run(tmp_path / "with", Watched())
    assert shown[forgotten] == 0 and shown[-1] > 0 and sorted(shown) == shown


def test_a_nan_score_is_never_the_best(tmp_path):
    scores = iter([float("nan"), 3.0, 2.0, float("inf")] + [5.0] * 50)
    best, memory = search.search(
        task(), lambda widths: next(scores), search.Greedy(), rounds=2, per_round=4,
        memory_path=tmp_path / "memory.jsonl",
    )  # fmt: skip
    assert best.score == 2.0 and memory[0].score == float("inf")
    with pytest.raises(ValueError, match="no candidate of .* has a finite loss"):
        search.search(
            task(), lambda widths: np.nan, search.Greedy(), rounds=1, per_round=2,
            memory_path=tmp_path / "worse.jsonl",
        )  # fmt: skip


class Model(http.server.BaseHTTPRequestHandler):
    """A server with OpenAI's interface that replies from a list and records the requests."""

    replies: list = []
    asked: list = []

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        Model.asked.append((self.path, self.headers.get("Authorization"), body))
        content = Model.replies.pop(0)
        text = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Model.replies, Model.asked = [], []
    with http.server.HTTPServer(("127.0.0.1", 0), Model) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/v1"
        httpd.shutdown()
        thread.join()


def test_a_language_model_proposes_sees_the_memory_and_is_corrected(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    here = task()
    good = search.uniform(here)
    full = {name: v.width for name, v in here.variables.items()}
    other = search.move_to_target(here, search.random_widths(here, np.random.default_rng(5)))
    said = f"Here it is: {json.dumps(good)}"
    Model.replies = ["I would rather not.", json.dumps(full), said, json.dumps(other)]
    model = LanguageModel(server, "some-model")
    best, memory = run(tmp_path, model, rounds=2, per_round=1)
    assert [entry.widths for entry in memory] == [good, other]
    assert best.score == min(score(good), score(other))
    path, key, first = Model.asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert first["model"] == "some-model" and first["temperature"] == 0
    assert first["messages"][0]["content"] == prompt(here, [])
    # the error messages: no object, then 1.0 of the FLOPs
    assert "holds no JSON object" in Model.asked[1][2]["messages"][-1]["content"]
    assert "The FLOPs are 1.0000" in Model.asked[2][2]["messages"][-1]["content"]
    # the second round is a new conversation that shows the first one's score
    last = Model.asked[3][2]["messages"]
    assert len(last) == 1 and f"score {memory[0].score:.6g}" in last[0]["content"]


def test_a_language_model_sees_its_earlier_proposals_of_a_round(server):
    here = task()
    good = search.uniform(here)
    other = search.move_to_target(here, search.random_widths(here, np.random.default_rng(5)))
    Model.replies = [json.dumps(widths) for widths in (good, good, other)]
    assert LanguageModel(server, "m").propose(here, [], 2, None) == [good, other]
    first, second, third = (body["messages"] for _, _, body in Model.asked)
    assert "to be scored" not in first[0]["content"]
    assert f"to be scored: {json.dumps(good)}" in second[0]["content"]
    assert "have been proposed already" in third[-1]["content"]


def test_a_language_model_that_never_fits_or_answers_stops_the_search(server, monkeypatch):
    waits = []
    monkeypatch.setattr(chat.time, "sleep", waits.append)
    Model.replies = [None]
    with pytest.raises(ValueError, match="did not answer as expected .it holds no text"):
        LanguageModel(server, "m").propose(task(), [], 1, None)
    Model.replies = ["no"] * 2
    with pytest.raises(ValueError, match="gave no usable widths in 2 attempts"):
        LanguageModel(server, "m", attempts=2).propose(task(), [], 1, None)
    with pytest.raises(ValueError, match="did not answer as expected"):
        LanguageModel("http://127.0.0.1:9/v1", "m").propose(task(), [], 1, None)
    assert waits == [1, 2, 4, 8, 16]
    with pytest.raises(ValueError, match="prune.llm_url=localhost"):
        LanguageModel("localhost", "m")


def test_replies_are_checked_name_by_name():
    here = task()
    good = search.uniform(here)
    name = next(iter(good))
    for change, message in (
        ({name: 7}, f"{name} has the width 7, not one of"),
        ({name: float(good[name])}, f"{name} has the width {float(good[name])}, not one of"),
        ({"extra": 8}, r"unknown \(\['extra'\]\)"),
    ):
        with pytest.raises(ValueError, match=message):
            checked(here, json.dumps(good | change))
    with pytest.raises(ValueError, match="Names are missing"):
        checked(here, "{}")
    assert checked(here, f"```json\n{json.dumps(good)}\n```") == good
    with pytest.raises(ValueError, match="have been proposed already"):
        checked(here, json.dumps(good), [good])


def test_a_reply_near_the_target_is_moved_to_it():
    """The memory then holds the widths that the model chose, and near copies count as known."""
    here, rng = task(), np.random.default_rng(0)
    drawn = (search.swapped(here, search.uniform(here), rng, 2) for _ in range(100))
    beside = next(
        w for w in drawn if here.fits(here.share(w)) and search.move_to_target(here, w) != w
    )
    moved = search.move_to_target(here, beside)
    assert checked(here, json.dumps(beside)) == moved
    with pytest.raises(ValueError, match="or the nearest ones at the target"):
        checked(here, json.dumps(beside), [moved])
