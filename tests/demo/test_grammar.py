"""The demo text: reproducible for a seed, and consistent with the rules that a model can learn from it."""

import hashlib
import re
from itertools import pairwise

import pytest

from pgprune_cli.demo.grammar import DAYS, NUMBERS, PLURALS, generate

TEXT = generate(seed=7, characters=200_000)
PAIRS = {")": "(", "]": "[", "}": "{", ">": "<"}


def paragraphs(seed: int) -> set[str]:
    return set(generate(seed, 100_000).split("\n\n")[:-1])


@pytest.mark.parametrize("characters", [0, 1, 999, 5000])
def test_generate_returns_exactly_the_requested_length(characters: int) -> None:
    assert len(generate(3, characters)) == characters


def test_a_shorter_text_is_the_beginning_of_a_longer_one_with_the_same_seed() -> None:
    assert generate(7, 200_000) == TEXT
    assert TEXT.startswith(generate(7, 12_345))


def test_the_text_of_a_seed_never_changes() -> None:
    """The demo model was trained on this text. If the text changes, the model must be trained again."""
    digest = hashlib.sha256(generate(0, 100_000).encode()).hexdigest()
    assert digest == "6f8e34193cf844edd40ab1993644ffdae030ed6107ecdc7e629f35bec0f1b9e5"


def test_two_seeds_share_no_paragraph() -> None:
    assert not paragraphs(0) & paragraphs(1)


def test_brackets_are_balanced() -> None:
    opened: list[str] = []
    sentences = re.findall(r"\bpack(?:s|ed) a ([^.]+)\.", TEXT)
    assert any(mark in sentence for sentence in sentences for mark in PAIRS)
    for sentence in sentences:
        for mark in re.findall(r"[][(){}<>]", sentence):
            if mark in PAIRS:
                assert opened.pop() == PAIRS[mark]
            else:
                opened.append(mark)
        assert not opened


def test_a_quotation_is_repeated_word_for_word() -> None:
    quotations = re.findall(r'sa(?:ys|id) "([^"]+)" and \w+ repeat(?:s|ed) "([^"]+)"', TEXT)
    assert quotations
    assert all(quoted == repeated for quoted, repeated in quotations)


def test_lists_have_the_announced_length() -> None:
    drawings = re.findall(r"dr(?:aws|ew) (\w+) (\w+): ([^.]+)\.", TEXT)
    assert drawings
    for count, nouns, listed in drawings:
        things = listed.split(", ")
        assert len(things) == NUMBERS.index(count) + 1
        assert {PLURALS.get(thing, thing + "s") for thing in things} == {nouns}


def test_recitations_count_in_equal_steps() -> None:
    recitations = re.findall(r"count(?:s|ed) from (\w+) to (\w+): ([^.]+)\.", TEXT)
    assert recitations
    for first, last, listed in recitations:
        words = listed.split(", ")
        places = [(DAYS if word in DAYS else NUMBERS).index(word) for word in words]
        assert (words[0], words[-1]) == (first, last)
        assert len({after - before for before, after in pairwise(places)}) == 1


def test_a_verb_agrees_with_its_subject_across_a_clause() -> None:
    sentences = re.findall(r"hears that the \w+ (\w+) .*?(\w+) and (is|are) \w+\.", TEXT)
    assert {be for _, _, be in sentences} == {"is", "are"}
    for subject, verb, be in sentences:
        plural = subject in PLURALS.values() or subject.endswith("s")
        assert plural == (be == "are") == (not verb.endswith("s"))


def test_recalled_facts_were_stated_before() -> None:
    recalled = 0
    for paragraph in TEXT.split("\n\n")[:-1]:
        facts = re.findall(r"(\w+) own\w* \w+ (\w+) (\w+) and", paragraph)
        owners = {name: (colour, goods) for name, colour, goods in facts}
        assert len(owners) == 3
        for name, goods, colour in re.findall(r"(\w+)'s (\w+) (?:is|are|was|were) (\w+)\.", paragraph):
            assert owners[name] == (colour, goods)
            recalled += 1
        for home, name in re.findall(r"Who live\w* by the (\w+)\? (\w+)\.", paragraph):
            assert re.search(rf"{name} own[^.]* live\w* by the {home}\.", paragraph)
            recalled += 1
    assert recalled
