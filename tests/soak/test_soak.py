"""The soak, for as long as the variables of tests/kit/soak_runs.py say."""

import json

import pytest

from kit.soak_runs import given

from .files import write_variants
from .invariants import Faults
from .kills import kills
from .soak import soak
from .wrong_inputs import wrong_inputs


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    write_variants(folder)
    return folder


@pytest.fixture
def faults():
    """Fails the test for what was found."""
    faults = Faults()
    yield faults
    kinds = sorted({kind for kind, _ in faults.found})
    assert not faults.found, f"{len(faults.found)} faults: {', '.join(kinds)}\n" + "\n".join(
        f"{kind}: {words}" for kind, words in faults.found
    )


def said(figures):
    print(json.dumps(dict(sorted(figures.items())), indent=1), flush=True)


def test_the_mix(tmp_path, variants, faults):
    said(soak(tmp_path, variants, given("SECONDS"), given("SEED"), faults))


def test_fuzz(tmp_path, variants, faults):
    figures = wrong_inputs(tmp_path, variants, given("FUZZ"), given("SEED"), faults)
    said(figures)
    assert figures["reached execution"] > given("FUZZ") / 3, "too few of the prompts were let through to be a test"


def test_kills(tmp_path, variants, faults):
    said(kills(tmp_path, variants, given("KILLS"), given("SEED"), faults))
