"""The page shows what was found, asks for nothing else, and hands out nothing but the pictures."""

import http.client
import io
import os
import re
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np
import pytest
from browser import Browser, needs_browser
from noise import draw
from PIL import Image

from longclip import heat
from longclip.search.gallery import Gallery
from longclip.search.index import picture
from longclip.search.serving import Server
from longclip.types import UserError

QUERY = 'A "red" bus waits. Behind it <b>stands</b> a tree & a wall.'


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.words = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words += data

    def all(self, tag, name):
        return [attributes[name] for found, attributes in self.tags if found == tag and name in attributes]


@pytest.fixture
def gallery(photos, search):
    os.rename(photos / "a/1.png", photos / "<script>alert(1)<!--.png")
    draw(photos / "wide.png", 9, size=(900, 400))
    return Gallery(search(photos), "Search <photos>", 7)


@pytest.fixture
def server(gallery):
    """The gallery on a port of its own, remembering what was asked."""
    asked, reply = [], gallery.reply

    def remembered(path, parameters):
        asked.append(path)
        return reply(path, parameters)

    gallery.reply = remembered
    with Server(gallery, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server, asked
        server.shutdown()


def page(gallery, **parameters):
    reply = gallery.reply("/", parameters)
    assert reply.status == 200
    return Tags(reply.body.decode())


def asked(gallery, address):
    parts = urlsplit(address)
    return gallery.reply(parts.path, dict(parse_qsl(parts.query)))


def number(gallery, name):
    return [file.path for file in gallery.searcher.index.files].index(name)


def pixels(body):
    return np.asarray(Image.open(io.BytesIO(body)))


@pytest.mark.parametrize("query", ["", QUERY])
def test_every_address_on_the_page_is_its_own_and_leads_to_a_picture(gallery, query):
    found = page(gallery, q=query)
    addresses = found.all("img", "src") + found.all("a", "href")
    assert addresses
    for address in addresses:
        assert re.match(r"/(small|whole|heat)/\d", address)
        reply = asked(gallery, address)
        assert reply.status == 200
        assert pixels(reply.body).size
    assert found.all("link", "href") == ["data:,"]
    assert not [tag for tag, _ in found.tags if tag in ("script", "iframe", "object", "base", "b")]


def test_every_picture_has_its_score_and_every_sentence_of_the_query(gallery):
    found, answer = page(gallery, q=QUERY), gallery.searcher.answer(QUERY, 7)
    assert len(answer.sentences) == 2
    assert found.words.count(answer.sentences[1]) == 8  # seven pictures and the text field
    for result in answer.results:
        assert f"{result.score:.3f}" in found.words
        assert result.path in found.words
    assert "<script>alert(1)<!--.png" in found.words
    assert found.all("li", "tabindex") == ["0"] * 14
    assert found.all("li", "class") == ["best"] * 7


def test_a_heat_map_lies_over_its_picture_and_is_that_of_its_sentence(gallery):
    wide = number(gallery, "wide.png")
    small = pixels(gallery.reply(f"/small/{wide}", {}).body)
    assert small.shape == (284, 640, 3)
    drawn = gallery.reply(f"/heat/{wide}", {"sentence": "A tree."}).body
    assert pixels(drawn).shape == (284, 640, 4)
    image_CHW = picture(gallery.searcher.index.path(wide))
    transform = gallery.searcher.transform
    (map_YX,) = heat.heat(gallery.searcher.tower, transform(image_CHW), ["A tree."]).heat_SYX
    wanted = pixels(heat.overlay(map_YX, 284, 640, transform.window(400, 900)))
    assert np.abs(pixels(drawn).astype(int) - wanted.astype(int)).max() <= 2  # rounding of one text or two
    other = gallery.reply(f"/heat/{wide}", {"sentence": "Snow on a roof."}).body
    assert other != drawn


@pytest.mark.parametrize(
    "path",
    [
        "/whole/../../outside.png",
        "/whole//etc/passwd",
        "/whole/-1",
        "/small/99",
        "/whole/1/..",
        "/x",
        "/whole/",
        "/whole/%2e%2e",
        "/small/1 ",
        "/heat",
        "/whole/1e3",
        "/whole/٣",
    ],
)
def test_nothing_but_indexed_pictures_can_be_asked_for(gallery, path):
    assert gallery.reply(path, {"sentence": "x"}).status == 404


def test_a_picture_that_is_gone_or_was_swapped_is_no_crash(gallery):
    wide = number(gallery, "wide.png")
    path = gallery.searcher.index.path(wide)
    path.write_text("secret")
    for what in ("small", "whole"):
        reply = gallery.reply(f"/{what}/{wide}", {})
        assert reply.status == 400
        assert b"secret" not in reply.body
    path.unlink()
    assert gallery.reply(f"/small/{wide}", {}).status == 400
    assert gallery.reply(f"/whole/{wide}", {}).status == 404


def test_a_model_without_patches_has_a_page_without_maps(gallery, monkeypatch):
    gallery.points = False
    found = page(gallery, q=QUERY)
    assert not [address for address in found.all("img", "src") if address.startswith("/heat")]
    assert "no heat maps" in found.words


def test_queries_that_cannot_be_answered_are_told_so(gallery):
    assert gallery.reply("/", {"q": "a" * 20_001}).status == 400
    assert gallery.reply("/heat/0", {}).status == 400


def test_the_server_forbids_scripts_and_other_hosts(server):
    url = server[0].url
    with urllib.request.urlopen(f"{url}?{urlencode({'q': QUERY})}") as reply:
        policy = reply.headers["Content-Security-Policy"]
        assert "stands" in reply.read().decode()
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy
    stranger = urllib.request.Request(url, headers={"Host": "pictures.example:80"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(stranger)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}whole/..%2f..%2fetc/passwd")


@pytest.mark.parametrize(("path", "host", "status"), [("/", "[", 403), ("http://[", "localhost", 404)])
def test_what_is_no_address_gets_an_answer(server, path, host, status):
    connection = http.client.HTTPConnection(*server[0].server_address)
    connection.request("GET", path, headers={"Host": host})
    assert connection.getresponse().status == status
    connection.close()


def test_an_address_that_is_taken_is_a_sentence(server, gallery):
    with pytest.raises(UserError, match="choose another --port"):
        Server(gallery, "127.0.0.1", server[0].server_address[1])


@needs_browser
def test_a_browser_shows_maps_where_a_sentence_is_pointed_at_and_not_before(server, tmp_path):
    served, asked = server
    with Browser(tmp_path / "browser") as browser:
        browser.open(f"{served.url}?{urlencode({'q': QUERY})}")
        browser.settle()
        assert not [path for path in asked if path.startswith("/heat")]
        browser.hover("li:nth-child(2)")
        browser.settle()
        shown = "[...document.querySelectorAll('.map')].filter(map => map.getClientRects().length)"
        assert browser.run(f"{shown}.map(map => map.naturalWidth > 0)") == [True]
        first = browser.run(f"{shown}[0].src")
        browser.open(f"{served.url}?{urlencode({'q': QUERY})}", width=390, touch=True)
        browser.run("document.querySelector('li:nth-child(2)').focus()")
        assert browser.run(f"{shown}.map(map => map.src)") == [first]
        assert browser.run("document.documentElement.scrollWidth") <= 390
        assert not browser.complaints
        assert all(address.startswith((served.url, "data:")) for address in browser.asked)
