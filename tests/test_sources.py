"""Where pictures and films come from: redirects, limits, and servers that are slow or lie."""

import http.server
import io
import threading
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image
from test_open_image import PIXELS, encode, error_of

from minivlm import open_image as module
from minivlm import sources
from minivlm.errors import MinivlmError
from minivlm.open_image import open_image
from minivlm.sources import describe, open_source

# ---- URLs


class Handler(http.server.BaseHTTPRequestHandler):
    png = encode(Image.fromarray(PIXELS))

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/cat.png" or path == "/%C3%BC%20.png":
            self.answer(self.png)
        elif path == "/page.png":
            self.answer(b"<!doctype html><title>Not found</title>")
        elif path == "/cut.png":
            self.answer(self.png[:40], length=len(self.png))
        elif path == "/silent.png":
            time.sleep(1)
        elif path == "/drip.png":
            self.answer(b"", length=10**6)
            for _ in range(20):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        elif path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        else:
            self.send_error(404)

    def answer(self, body, length=None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads, running.block_on_close = True, False
        running.handle_error = lambda *_: None  # clients hang up on purpose
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_open_image_reads_urls(server):
    for url in ("/cat.png", "/cat.png?size=large", "/ü .png", "/to//cat.png", "/to//to//cat.png"):
        assert np.array_equal(np.asarray(open_image(server + url)), PIXELS), url


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/none.png", "the server answered 404 Not Found"),
        ("/page.png", "looks like a web page"),
        ("/cut.png", "damaged"),
        ("/to/file:///etc/passwd", "is not allowed"),
        ("/to/data:image/png,x", "is not allowed"),
        ("/to/ftp://127.0.0.1/cat.png", "redirects from http to ftp, which is refused"),
        ("/to//none.png", "404"),
    ],
)
def test_open_image_refuses_bad_answers(server, path, says):
    message = error_of(server + path)
    assert says in message and "127.0.0.1" in message


def test_a_download_that_fails_leaves_no_file_open(server):
    files = []
    with pytest.raises(MinivlmError, match="404"):
        open_source(f"{server}/none.png", "film", 10**6, 10.0, lambda: files.append(io.BytesIO()) or files[0])
    assert files[0].closed


def test_open_image_stops_redirect_loops():
    class Loop(Handler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", "/again")
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Loop) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        assert "302" in error_of(f"http://127.0.0.1:{running.server_port}/")
        running.shutdown()


def test_redirects_lead_up_to_https_and_never_down():
    handler = sources._Redirects()
    request = urllib.request.Request("http://host/a")
    assert handler.redirect_request(request, None, 302, "", {}, "https://host/a").full_url == "https://host/a"
    with pytest.raises(MinivlmError, match="from https to http"):
        handler.redirect_request(urllib.request.Request("https://host/a"), None, 302, "", {}, "http://host/a")


def test_download_has_a_size_limit(server, monkeypatch):
    file = io.BytesIO()
    sources.download(server + "/cat.png", file, len(Handler.png), 60)
    assert file.getvalue() == Handler.png
    with pytest.raises(MinivlmError, match="is larger than"):
        sources.download(server + "/cat.png", io.BytesIO(), len(Handler.png) - 1, 60)
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    assert "is larger than" in error_of(server + "/cat.png")
    assert "is larger than" in error_of("data:image/png;base64," + "A" * 100)


def test_download_gives_up_on_slow_servers(server, monkeypatch):
    monkeypatch.setattr(sources, "SILENCE_SECONDS", 0.1)
    assert "timed out" in error_of(server + "/silent.png")
    monkeypatch.setattr(module, "URL_SECONDS", 0.2)
    assert "took longer than 0.2 seconds" in error_of(server + "/drip.png")


def test_open_source_gives_a_file_at_its_start_with_a_name_and_its_head(server, tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(Handler.png)
    for source, name in {server + "/cat.png": server + "/cat.png", path: str(path), path.as_uri(): str(path)}.items():
        file, ours, head = open_source(source, "film", 10**6, 60)
        with file:
            assert (file.read(), ours, head) == (Handler.png, name, Handler.png[:512])


def test_a_download_goes_where_the_caller_says(server, tmp_path):
    with open(tmp_path / "film", "w+b") as scratch:
        file, _, _ = open_source(server + "/cat.png", "film", 10**6, 60, lambda: scratch)
        assert file is scratch and file.read() == Handler.png


def test_what_is_no_such_kind_is_named(tmp_path):
    with pytest.raises(MinivlmError, match="is a directory, not a film"):
        open_source(tmp_path, "film", 1, 1)


def test_describe_knows_films_from_pictures():
    assert describe(b"\0\0\0\x18ftypisom") == "a film (MP4 or MOV)"
    assert describe(b"\0\0\0\x18ftypavif") == "an AVIF picture; save it as PNG"
    assert describe(b"\x1a\x45\xdf\xa3") == "a film (WebM or Matroska)"
