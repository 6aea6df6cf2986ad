"""What the server says of its decisions is shown in the panel's language: every sentence that the code can say."""

import json
import re

import pytest

from kit import said
from kit.locales import LOCALES, flat, texts
from kit.pack import ROOT
from kit.page_modules import copy_modules, run_script

LANGUAGES = ("zh", "ja")
# What stands for anything that is not known before it is said: a size, a count or a name.
SOMETHING = "7.5 GiB"
# Words that stay: a name in quotes, a unit, and what an error may end with.
STAY = re.compile(r"'[^']*'|no message|\bms\b|(GET|POST) \S+")
ENGLISH = re.compile(r"(?<![\w.-])[a-z]{2,}(?![\w.-])")
# Texts that no ledger says: names, what a route or a comparison answers, and what a function says that is handed
# over.
OTHERS = ("route.", "compile.patches", "compare.failed", "compare.interrupted", "compare.out")
OTHERS += ("cache.name", "cache.store_name", "cache.tier")
# What was tuned before the pack was loaded, and what is handed on by names that several things have.
OTHERS += (
    "cache.route",
    "store.dropped",
    "store.late",
    "cache.tuned",
    "cache.left_alone",
    "cache.is_set",
    "cache.not_glibc",
    "cache.mallopt",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("said")
    copy_modules(found, "said.mjs")
    return found


@pytest.fixture
def tell(folder):
    def tell(sentences, language):
        locales = [LOCALES / one / "main.json" for one in ("en", language)]
        return run_script(
            folder, "said.mjs", sentences, *locales, skipped="what the server says in other languages: it needs node"
        )

    return tell


def untranslated(tell, sentences, language):
    """The sentences of which something stays English, each as it is told."""
    whole = [sentence.replace(said.HOLE, SOMETHING) for sentence in sentences]
    told = tell(whole, language)
    names = {word for _, text in flat(texts(language, "main")["spillway"]["said"]) for word in ENGLISH.findall(text)}

    def is_left(sentence, one):
        english = set(ENGLISH.findall(STAY.sub("", one["text"]))) - names
        return STAY.sub("", sentence) not in ("", SOMETHING) and (not one["known"] or english)

    return {sentence: one["text"] for sentence, one in zip(whole, told, strict=True) if is_left(sentence, one)}


@pytest.fixture(scope="module")
def sentences():
    return said.said(ROOT)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_sentence_of_a_decision_is_there_in_every_language(tell, sentences, language):
    assert len(sentences) > 300, "the code is read: what it says is found"
    assert untranslated(tell, list(sentences), language) == {}


def test_in_english_it_stays_as_it_is(tell, sentences):
    whole = [sentence.replace(said.HOLE, SOMETHING) for sentence in sentences]
    assert [one["text"] for one in tell(whole, "en")] == whole


def test_each_text_is_of_a_sentence_that_is_said(sentences):
    """A sentence that was changed leaves no old text behind, which would look like a translation."""
    parts = [re.sub(r"\d+", said.HOLE, sentence) for sentence in sentences]
    for key, text in flat(texts("en", "main")["spillway"]["said"]):
        longest = max(re.split(r"\{\w+\}|\d+", text), key=len)
        assert key.startswith(OTHERS) or any(longest in part for part in parts), (key, text)


NEW = """
from ..ops.ledger import in_words

MORE = {"a": "for no reason that anybody knows", "b": "nobody asked"}

class Model:
    def work(self, size, why):
        words = f"gave up all hope of {size} bundles"
        if size:
            words += f", as {why} said so"
        self.ledger.decide(words)
        self.ledger.decide_once(self.because() if size else "never before seen: " + MORE[why])

    def because(self):
        return f"RAM runs short, says {self.whose}"

def call(model):
    model.work(1, why="a wise man")
"""
FOUND = [
    "gave up all hope of \0 bundles",
    "gave up all hope of \0 bundles, as a wise man said so",
    "RAM runs short, says \0",
    "never before seen: for no reason that anybody knows",
    "never before seen: nobody asked",
]


def test_a_new_sentence_without_a_translation_is_seen(tell, tmp_path):
    for folder in said.FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / "patcher" / "new.py").write_text(NEW)
    found = said.said(tmp_path)
    assert sorted(found) == sorted(FOUND) and set(found.values()) == {"patcher/new.py:11", "patcher/new.py:12"}
    assert len(untranslated(tell, FOUND, "zh")) == len(FOUND)


EXAMPLES = json.loads((ROOT / "tests" / "web" / "said.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_sentence_within_a_sentence_is_told_too(tell, language):
    told = tell(list(EXAMPLES[language]), language)
    assert [one["text"] for one in told] == list(EXAMPLES[language].values())
    assert all(one["known"] for one in told)


@pytest.mark.parametrize(
    "words", ["", "a node of nobody's failed: no idea", "x" * 5000, "free 3.0 GiB, perhaps {size}"]
)
def test_what_nobody_knows_stays_as_it_is_and_is_known_as_such(tell, words):
    assert tell([words], "zh") == [{"text": words, "known": False}]
