"""Names become folders, on disk and by way of a small hub on loopback that redirects, refuses, lies and hangs up."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save

from minivlm import hub
from minivlm.errors import MinivlmError
from minivlm.hub import ALIASES, GIGABYTES, list_known, resolve
from minivlm.weights import read_headers

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = save({"weight": torch.arange(300_000.0)})
FILES = {
    "config.json": b'{"model_type": "llava"}',
    "chat_template.jinja": b"{{ messages }}",
    "tokenizer.model": b"pieces",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"the same again",
    "README.md": b"never asked for",
    "original/params.json": b"never asked for",
    "tf_model.h5": b"never asked for",
}
SMALL = {"config.json", "chat_template.jinja", "tokenizer.model"}


class Handler(BaseHTTPRequestHandler):
    """What huggingface_hub asks a hub: a revision's commit, its tree, and files, the large ones behind a redirect."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.log.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        listing = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/(cdn/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        if not (listing or file):
            return self.answer(404)
        owner = listing[1] if listing else file[2]
        revision = listing[3] if listing else file[3]
        if owner not in hub.repositories:
            return self.answer(401, X_Error_Code="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = hub.repositories[owner]
        if listing and listing[2] == "revision":
            info = {"id": owner, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.answer(200, json.dumps(info).encode())
        if listing:
            return self.answer(200, json.dumps([self.entry(name, body) for name, body in files.items()]).encode())
        if owner in hub.gated and not file[1] and not self.headers.get("Authorization"):
            return self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="restricted")
        body = files[file[4]]
        digest = hashlib.sha256(body).hexdigest()
        if not file[1] and len(body) > 1000:
            elsewhere = f"http://localhost:{hub.server_port}/cdn{path}"     # another host, as the real hub has
            return self.answer(302, Location=elsewhere, X_Linked_Size=len(body), X_Linked_Etag=f'"{digest}"',
                               X_Repo_Commit=COMMIT, ETag='"pointer"')
        return self.send(file[4], body, ETag=f'"{digest}"', X_Repo_Commit=COMMIT)

    do_GET = do_HEAD

    @staticmethod
    def entry(name, body):
        entry = {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
        if len(body) > 1000:
            entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
        return entry

    def send(self, name, body, **headers):
        """The file, or the part of it that was asked for, or what the test at hand wants to go wrong."""
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
        body = self.server.lies.get(name, body)[start:]
        if self.command == "GET" and self.server.hang_up.get(name, 0) > 0:
            self.server.hang_up[name] -= 1
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif start:
            end = start + len(body)
            self.answer(206, body, Content_Range=f"bytes {start}-{end - 1}/{end}", **headers)
        else:
            self.answer(200, body, **headers)


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {"owner/model": dict(FILES)}
        self.gated = set()
        self.hang_up = {}       # file → how many answers break off half-way
        self.lies = {}          # file → what is sent in its place
        self.log = []           # (method, path, range, authorization)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def fetched(self):
        return {path.rpartition("/")[2] for method, path, _, _ in self.log if method == "GET" and "/resolve/" in path}


@pytest.fixture
def server():
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


ASK = """
import json, sys
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 65536      # what is lost when a connection breaks; 10 MB as it comes
from minivlm.errors import MinivlmError
from minivlm.hub import resolve
try:
    print(json.dumps({"folder": str(resolve(**json.loads(sys.argv[1])))}))
except MinivlmError as error:
    print(json.dumps({"error": str(error)}))
"""


def ask(server, tmp_path, name="owner/model", env=None, **arguments):
    """resolve() in a process of its own, since huggingface_hub reads its environment when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.endpoint, "no_proxy": "*"} | (env or {})
    command = [sys.executable, "-c", ASK, json.dumps({"name": name, **arguments})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "\n" not in answer.get("error", "")
    return answer


def refusal(*arguments, **keywords):
    with pytest.raises(MinivlmError) as caught:
        resolve(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- downloads -------------------------------------------------------------------------------------------------------


def test_download_takes_what_is_needed_and_then_the_cache(server, tmp_path):
    """Through a redirect; nothing but the files of use; a second call fetches none; a third needs no hub at all."""
    folder = Path(ask(server, tmp_path)["folder"])
    assert {file.name for file in folder.iterdir()} == {*SMALL, "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert any(path.startswith("/cdn/") for _, path, _, _ in server.log)

    server.log.clear()
    assert ask(server, tmp_path)["folder"] == str(folder) and not server.fetched()
    server.log.clear()
    assert ask(server, tmp_path, offline=True)["folder"] == str(folder)
    assert ask(server, tmp_path, env={"HF_HUB_OFFLINE": "1"})["folder"] == str(folder) and not server.log
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert ask(server, tmp_path, env=nobody)["folder"] == str(folder)


def test_download_falls_back_to_bin(server, tmp_path):
    del server.repositories["owner/model"]["model.safetensors"]
    folder = Path(ask(server, tmp_path)["folder"])
    assert (folder / "pytorch_model.bin").read_bytes() == b"the same again"


def test_download_without_weights(server, tmp_path):
    folder = Path(ask(server, tmp_path, weights=False)["folder"])
    assert {file.name for file in folder.iterdir()} == SMALL
    assert "minivlm is offline" in ask(server, tmp_path, offline=True)["error"]


def test_download_resumes_after_a_broken_connection(server, tmp_path):
    server.hang_up["model.safetensors"] = 1
    folder = Path(ask(server, tmp_path)["folder"])
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    (part,) = {part for _, path, part, _ in server.log if path.endswith("model.safetensors") and part}
    assert 0 < int(re.match(r"bytes=(\d+)-", part)[1]) <= len(WEIGHTS) // 2


def test_download_of_the_wrong_length_is_refused_and_mended(server, tmp_path):
    """The next run fetches that file again, and none of those that were finished."""
    server.lies["model.safetensors"] = WEIGHTS[:-1000]
    error = ask(server, tmp_path)["error"]
    assert "downloading owner/model" in error and "run again" in error
    server.lies.clear()
    server.log.clear()
    assert Path(ask(server, tmp_path)["folder"], "model.safetensors").read_bytes() == WEIGHTS
    assert server.fetched() == {"model.safetensors"}


def test_download_of_a_corrupted_file_is_named_when_it_is_read(server, tmp_path):
    server.lies["model.safetensors"] = bytes(len(WEIGHTS))
    folder = ask(server, tmp_path)["folder"]
    with pytest.raises(MinivlmError, match="model.safetensors is damaged"):
        read_headers(folder)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_gated_says_what_to_do_and_a_token_opens_it(server, tmp_path):
    server.gated.add("owner/model")
    error = ask(server, tmp_path)["error"]
    assert f"gated: accept its licence at {server.endpoint}/owner/model" in error and "HF_TOKEN" in error
    assert "folder" in ask(server, tmp_path, env={"HF_TOKEN": "hf_secret"})
    assert "Bearer hf_secret" in {token for *_, token in server.log}


def test_unknown_repository(server, tmp_path):
    error = ask(server, tmp_path, "llava-hf/llava-v1.6")["error"]
    assert f"no llava-hf/llava-v1.6 at {server.endpoint}" in error and "did you mean llava-v1.6" in error


def test_revision(server, tmp_path):
    assert "no revision 'v9'" in ask(server, tmp_path, revision="v9")["error"]
    assert ask(server, tmp_path, revision=COMMIT)["folder"].endswith(COMMIT)


def test_nothing_cached_and_nobody_there(server, tmp_path):
    assert "does not answer: check the network" in ask(server, tmp_path, env={"HF_ENDPOINT": "http://127.0.0.1:9"})["error"]
    assert "minivlm is offline" in ask(server, tmp_path, offline=True)["error"]
    assert "minivlm is offline" in ask(server, tmp_path, env={"HF_HUB_OFFLINE": "1"})["error"]
    assert not server.log


@pytest.mark.parametrize(("file", "part"), [("adapter_config.json", "LoRA adapter"), ("mm_projector.bin", "projector")])
def test_part_of_a_model_on_the_hub(server, tmp_path, file, part):
    server.repositories["owner/model"] = {"config.json": b"{}", file: b"{}"}
    assert part in ask(server, tmp_path)["error"]


def test_disk_full(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    text = refusal("llava-v1.5")
    assert "the disk is full" in text and "14.1 GB" in text and "HF_HOME" in text


# ---- folders and names -----------------------------------------------------------------------------------------------


def test_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "llava-v1.6").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(tmp_path / "llava-v1.6") == resolve(f"{tmp_path}/llava-v1.6") == tmp_path / "llava-v1.6"
    assert resolve("~/llava-v1.6") == tmp_path / "llava-v1.6"
    assert "has no revisions" in refusal(tmp_path, revision="main")


def test_folder_named_like_an_alias(tmp_path, monkeypatch):
    """A checkpoint of that name is meant; an empty folder of that name is not."""
    asked = []
    monkeypatch.setattr(hub, "_download", lambda repository, *_: asked.append(repository) or tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "llava-v1.6").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("llava-v1.6") == tmp_path and asked == [ALIASES["llava-v1.6"]]
    (tmp_path / "llava-v1.6" / "config.json").touch()
    assert resolve("llava-v1.6") == Path("llava-v1.6") and len(asked) == 1


@pytest.mark.parametrize("name", ["./llava-v1.6", "/models/llava-v1.6", "a/b/llava-v1.6", "lava-v1.6", "llava-v1.6/"])
def test_no_such_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text = refusal(name)
    assert "no folder here" in text and "did you mean llava-v1.6" in text and "--list" in text


@pytest.mark.parametrize("name", ["", "quite something else", "x" * 5000, "a\x00b", "C:\\models\\llava"])
def test_odd_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "no folder here" in refusal(name)


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert "is a file: give the folder" in refusal(tmp_path / "model.safetensors")


def test_relative_to_a_checkpoint(tmp_path, monkeypatch):
    """An original LLaVA checkpoint names its vision tower from its own folder, from here, or absolutely."""
    (tmp_path / "checkpoint" / "clip").mkdir(parents=True)
    (tmp_path / "here" / "openai" / "clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert resolve("clip", relative_to=tmp_path / "checkpoint") == tmp_path / "checkpoint" / "clip"
    assert resolve("openai/clip", relative_to=tmp_path / "checkpoint") == Path("openai/clip")
    assert resolve(str(tmp_path / "here"), relative_to=tmp_path / "checkpoint") == tmp_path / "here"


@pytest.mark.parametrize(("file", "part"), [("adapter_config.json", "LoRA adapter"), ("mm_projector.bin", "projector"),
                                            ("non_lora_trainables.bin", "LoRA adapter")])  # fmt: skip
def test_part_of_a_model_on_disk(tmp_path, file, part):
    (tmp_path / file).touch()
    text = refusal(tmp_path)
    assert f"{part} only" in text and "merge" in text
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert resolve(tmp_path) == tmp_path


# ---- aliases and --list ----------------------------------------------------------------------------------------------


def test_aliases_are_sound():
    assert set(ALIASES.values()) == set(GIGABYTES)
    assert all(alias == alias.lower() and "/" not in alias for alias in ALIASES)
    assert all(re.fullmatch(r"[\w-]+/[\w.-]+", repository) for repository in ALIASES.values())


def test_alias_in_capitals(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(hub, "_download", lambda repository, *_: asked.append(repository) or tmp_path)
    asked = []
    resolve("Qwen2-VL-2B")
    assert asked == ["Qwen/Qwen2-VL-2B-Instruct"]


def test_list_known_sees_what_is_whole(monkeypatch, tmp_path):
    def cached(repository, filename):
        folder = tmp_path / repository
        return str(folder / filename) if (folder / filename).is_file() else None

    def put(alias, *files):
        folder = tmp_path / ALIASES[alias]
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).touch()

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    put("llava-v1.5", "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    put("llava-v1.6", "config.json", "model-00001-of-00002.safetensors")
    put("qwen2-vl-2b", "config.json", "model.safetensors")
    put("qwen2-vl-7b", "config.json")
    known = {row.alias: row for row in list_known()}
    assert list(known) == list(ALIASES)
    assert {alias for alias, row in known.items() if row.on_disk} == {"llava-v1.5", "llava-v1.5-7b", "qwen2-vl-2b"}
    assert known["llava-v1.5"].repository == "llava-hf/llava-1.5-7b-hf" and known["llava-v1.5"].gigabytes == 14.1
