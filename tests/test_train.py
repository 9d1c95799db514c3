"""The training loop: it learns, it goes on where it stopped, and it tells what is wrong with the data."""

import json

import onevision_tiny
import pytest
import qwen2_vl_tiny
import torch
import video_llava_tiny
from films import picture, write_film
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import minivlm
from minivlm import MinivlmError
from minivlm.demo import DEMO_CHECKPOINT, DEMO_PICTURE
from minivlm.models import llava_next
from minivlm.train import (
    FLOOR,
    Conversations,
    fit,
    initialise,
    learning_rate_at,
    main,
    make_optimizers,
    next_token_loss,
    read_conversations,
)


class Lines(Dataset):
    """y = 3x − 1, batch by batch."""

    def __init__(self, num_batches):
        self.num_batches = num_batches

    def __len__(self):
        return self.num_batches

    def __getitem__(self, index):
        x = torch.randn(16, 1, generator=torch.Generator().manual_seed(index))
        return x, 3 * x - 1


def learn(steps, state_file, stop_after=None):
    torch.manual_seed(0)
    module = nn.Linear(1, 1)
    seen = []

    def loss(batch):
        seen.append(batch)
        if stop_after is not None and len(seen) > stop_after:
            raise KeyboardInterrupt
        return (module(batch[0]) - batch[1]).square().mean()

    fit(module, Lines(steps), loss, 0.1, state_file, weight_decay=0.0, autocast=False, workers=0)
    return module, len(seen)


def test_fit_learns(tmp_path):
    module, _ = learn(300, tmp_path / "state.pt")
    assert abs(module.weight.item() - 3) < 0.02 and abs(module.bias.item() + 1) < 0.02


def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr("minivlm.train.SAVE_EVERY", 10)
    straight, _ = learn(60, tmp_path / "straight.pt")
    with pytest.raises(KeyboardInterrupt):
        learn(60, tmp_path / "state.pt", stop_after=37)
    resumed, steps = learn(60, tmp_path / "state.pt")
    assert steps == 30, "goes on from the last saved state"
    assert torch.equal(straight.weight, resumed.weight) and torch.equal(straight.bias, resumed.bias)


def test_muon_takes_the_matrices_inside_layers():
    module = nn.ModuleDict({"embed": nn.Embedding(8, 4), "layers": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))})
    adam, muon = make_optimizers(module, weight_decay=0.1, muon_decay=0.3)
    assert [id(p) for group in muon.param_groups for p in group["params"]] == [id(module["layers"][0].weight)]
    assert sum(len(group["params"]) for group in adam.param_groups) == len(list(module.parameters())) - 1


def test_muon_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("minivlm.train.SAVE_EVERY", 10)

    def learn(state_file, stop_after=None):
        torch.manual_seed(0)
        module, seen = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 1))}), []

        def loss(batch):
            seen.append(batch)
            if stop_after is not None and len(seen) > stop_after:
                raise KeyboardInterrupt
            return (module["layers"](batch[0]) - batch[1]).square().mean()

        fit(module, Lines(40), loss, 0.01, state_file, autocast=False, workers=0, muon_decay=0.1)
        return module

    straight = learn(tmp_path / "straight.pt")
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "state.pt", stop_after=25)
    resumed = learn(tmp_path / "state.pt")
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_an_old_torch_has_no_muon(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(MinivlmError, match="torch 2.9"):
        make_optimizers(nn.Linear(1, 1), 0.1, muon_decay=0.1)


def test_a_frozen_part_stays(tmp_path):
    torch.manual_seed(0)
    module = nn.Linear(1, 1)
    before = module.weight.clone()
    module.weight.requires_grad_(False)
    loss = lambda batch: (module(batch[0]) - batch[1]).square().mean()  # noqa: E731
    fit(module, Lines(5), loss, 0.1, tmp_path / "s.pt", weight_decay=0.1, autocast=False, workers=0)
    assert torch.equal(module.weight, before) and module.bias.item() != nn.Linear(1, 1).bias.item()


def test_a_loss_that_explodes_stops_the_run(tmp_path):
    module = nn.Linear(1, 1)
    with pytest.raises(MinivlmError, match="step 0; lower the learning rate"):
        fit(module, Lines(3), lambda batch: module(batch[0]).sum() / 0, 0.1, tmp_path / "s", autocast=False, workers=0)


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate_at(step, 1000, 2.0) for step in range(1001)]
    assert rates[0] < 0.1 and max(rates) == pytest.approx(2.0) and rates.index(max(rates)) < 40
    assert rates[1000] == pytest.approx(2.0 * FLOOR) and rates[500] > rates[900]


def test_initialise_gives_every_parameter_a_value():
    config = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
    model = llava_next.Model.from_config(config)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    initialise(model)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        is_scale = "norm" in name and name.endswith("weight")
        assert torch.all(parameter == 1) == is_scale, name


@pytest.fixture
def data(tmp_path):
    question = [{"type": "image", "image": DEMO_PICTURE.name}, {"type": "text", "text": "What is it?"}]
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": "a poster"}]
    (tmp_path / DEMO_PICTURE.name).write_bytes(DEMO_PICTURE.read_bytes())
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"messages": talk}) + "\n\n" + json.dumps({"messages": talk}) + "\n")
    return file


def test_the_loss_counts_answers_alone(data):
    vlm = minivlm.load(DEMO_CHECKPOINT, device="cpu", dtype="float32")
    inputs = vlm.preprocess(read_conversations(data)[:1], labels=True)
    logits = vlm.model(inputs).log_softmax(-1)
    at = (inputs.labels[0] >= 0).nonzero().flatten()
    by_hand = -sum(logits[0, i - 1, inputs.labels[0, i]] for i in at) / len(at)
    assert next_token_loss(vlm.model, inputs).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_batches_go_through_the_file_in_an_order_of_their_own(data):
    vlm = minivlm.load(DEMO_CHECKPOINT, weights=False)
    batches = Conversations(vlm, data, num_batches=4, batch_size=2)
    assert all(sorted(batches.order(epoch)) == [0, 1] for epoch in range(4))
    assert batches.order(3) == batches.order(3)


def test_the_command_trains_a_checkpoint_further(data, tmp_path):
    out = tmp_path / "trained"
    main(["--ckpt", str(DEMO_CHECKPOINT), "--data", str(data), "--out", str(out), "--steps", "6", "--batch-size", "2",
          "--learning-rate", "3e-3", "--freeze", "vision_tower", "--device", "cpu"])  # fmt: skip
    untrained, trained = (minivlm.load(folder, dtype="float32", device="cpu") for folder in (DEMO_CHECKPOINT, out))
    before, after = untrained.model.state_dict(), trained.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith("vision_tower") for name in moved)
    inputs = trained.preprocess(read_conversations(data)[:1], labels=True)
    assert next_token_loss(trained.model, inputs) < next_token_loss(untrained.model, inputs) - 1
    assert not (out / "training.pt").exists()


@pytest.mark.parametrize(
    "line, told",
    [
        ("{", "line 1 is not"),
        ('{"text": "x"}', "line 1 is not"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no answer"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "hi"}]}', "line 1 is not"),
        ('{"messages": [{"role": "user", "content": [5]}, {"role": "assistant", "content": "hi"}]}', "line 1 is not"),
        ("", "no conversation"),
    ],
)
def test_bad_data_is_named_by_its_line(tmp_path, line, told):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(MinivlmError, match=told):
        read_conversations(tmp_path / "x.jsonl")


def test_missing_data_is_one_line(tmp_path):
    with pytest.raises(MinivlmError, match="not there"):
        read_conversations(tmp_path / "none.jsonl")


def test_paths_are_relative_to_the_file_under_every_key(tmp_path):
    near = str(tmp_path / "a.png")
    told = [
        ({"type": "image", "image": "a.png"}, near), ({"type": "image", "path": "a.png"}, near),
        ({"type": "video", "url": "a.png"}, near), ({"type": "video", "video": ["a.png"]}, [near]),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, {"url": near}),
        ({"type": "image", "image": "https://host/a.png"}, "https://host/a.png"),
        ({"type": "video", "video": "data:,a"}, "data:,a"), ({"type": "text", "text": "a.png"}, "a.png"),
    ]  # fmt: skip
    talk = [{"role": "user", "content": [part for part, _ in told]}, {"role": "assistant", "content": "a.png"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": talk}))
    ((asked, answer),) = read_conversations(tmp_path / "x.jsonl")
    found = [next(value for key, value in part.items() if key != "type") for part in asked["content"]]
    assert found == [where for _, where in told] and answer == talk[1]


def test_the_command_ends_in_one_line(tmp_path, capsys):
    """Where a file is missing that only the data names, too: the training has begun by then."""
    part = {"type": "image", "image": "none.png"}
    talk = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "hi"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": talk}))
    for data, told in (("none.jsonl", "not there"), ("x.jsonl", "none.png: no such file")):
        paths = ["--data", str(tmp_path / data), "--out", str(tmp_path / "out")]
        assert main(["--ckpt", str(DEMO_CHECKPOINT), "--device", "cpu", *paths]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("minivlm: ") and told in last


@pytest.mark.parametrize(
    "family", [onevision_tiny, qwen2_vl_tiny, video_llava_tiny], ids=lambda module: module.__name__
)
def test_the_command_learns_from_films_beside_the_file(tmp_path, family):
    """From a film's file and from the files of its frames."""
    write_film(tmp_path / "film.mp4", 12)
    for number in range(2):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    talks = []
    for film in ({"video": "film.mp4", "num_frames": 2}, {"video": ["0.png", "1.png"]}):
        question = [{"type": "video", **film}, {"type": "text", "text": "What moves?"}]
        talks.append([{"role": "user", "content": question}, {"role": "assistant", "content": "a bar"}])
    data, out = tmp_path / "talks.jsonl", tmp_path / "trained"
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    start = str(family.opened()[0].folder)
    main(["--ckpt", start, "--data", str(data), "--out", str(out), "--steps", "2", "--batch-size", "2",
          "--device", "cpu"])  # fmt: skip
    untrained, trained = (minivlm.load(folder, dtype="float32", device="cpu") for folder in (start, out))
    before, after = untrained.model.state_dict(), trained.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("vision" in name or "video" in name for name in moved)
    assert any(name.startswith("language_model") for name in moved)
