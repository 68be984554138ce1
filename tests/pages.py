"""An HTML file as tests read it."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.words, self.source = [], [], path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())
