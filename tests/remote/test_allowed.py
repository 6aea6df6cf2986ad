"""Whoever starts ComfyUI says which addresses it asks, and what only looks like one of them is none."""

import pytest

from spillway.ops.remote.allowed import VARIABLE, check_allowed
from spillway.ops.remote.store import Refused, without_secrets

LOCAL = [
    "file:///etc/passwd",
    "local:///etc/passwd",
    "/etc/passwd",
    "~/x.gguf",
    "C:\\x.gguf",
    "\\\\server\\x",
    "file:x",
]
HIDDEN = ["simplecache::file:///etc/passwd", "zip://x.gguf::/mnt/a.zip", "reference://::file:///x", "git:///repository"]
SERVERS = [
    "https://server/x.gguf",
    "HTTP://server/x",
    "s3://bucket/x",
    "smb://nas/share/x",
    "sftp://nas/x",
    "hf://a/b/c",
]


def is_allowed(address, alone=True):
    try:
        check_allowed(address, alone)
    except Refused as error:
        return VARIABLE not in str(error)  # which is to say how to allow it
    return True


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_by_default_all_is_asked_for_this_machine_and_only_servers_for_others():
    for address in LOCAL + HIDDEN + SERVERS:
        assert is_allowed(address)
        assert is_allowed(address, alone=False) == (address in SERVERS), address


def test_it_can_be_turned_off_or_on_for_all(monkeypatch):
    for told, wanted in (("off", False), (" OFF ", False), ("all", True), ("All", True)):
        monkeypatch.setenv(VARIABLE, told)
        for address in LOCAL + HIDDEN + SERVERS:
            for alone in (True, False):
                assert is_allowed(address, alone) == wanted


@pytest.mark.parametrize(
    "told", ["on", "1", "https", "huggingface.co", "s3://models/, /mnt/nas", ",", "off, s3://a/", "a" * 5000]
)
def test_what_makes_no_sense_allows_nothing(told, monkeypatch):
    monkeypatch.setenv(VARIABLE, told)
    assert not any(is_allowed(address) for address in [*LOCAL, *HIDDEN, *SERVERS, "s3://models/x"])


def test_what_lies_below_an_address_is_allowed_and_nothing_else(monkeypatch):
    monkeypatch.setenv(VARIABLE, "https://huggingface.co/, s3://models/public , file:///mnt/nas/,http://nas:8000/")
    for address in (
        *("https://huggingface.co/a/b.gguf", "https://huggingface.co:443/a", "https://HuggingFace.co/a?download=true"),
        *("https://me:token@huggingface.co/a", "s3://models/public/x", "file:///mnt/nas/x.gguf", "http://nas:8000/x"),
        "file:///mnt/nas/a/b..c/x.gguf",
    ):
        assert is_allowed(address, alone=False), address
    for address in (
        *("https://huggingface.co.evil.com/a", "https://huggingface.co@evil.com/a", "http://huggingface.co/a"),
        *("https://huggingface.co:8443/a", "https://evil.com/https://huggingface.co/", "https://evil.com\\@nothing/a"),
        *("https://huggingface.co:99999999/a", "https://huggingface.co:x/a"),
        *("s3://models/publicity/x", "s3://models/x", "s3://other/public/x", "s3://models/public/../private/x"),
        *("file:///mnt/nas/../../etc/passwd", "file:///mnt/nas/%2e%2e/x", "file:///mnt/nas/%252e%252e/x"),
        *("file:///mnt/nas/x?/../../../etc/passwd", "file://host/mnt/nas/x", "file:///mnt/nasty/x", "/mnt/nas/x"),
        *("local:///mnt/nas/x", "http://nas/x", "http://nas:8001/x"),
        *("simplecache::https://huggingface.co/a", "https://huggingface.co/a::file:///etc/passwd"),
        *("zip://x::file:///mnt/nas/a.zip", "https://huggingface.co/\na"),
    ):
        assert not is_allowed(address), address


def test_a_protocol_alone_is_all_of_its_servers(monkeypatch):
    monkeypatch.setenv(VARIABLE, "https://,s3://models")
    assert is_allowed("https://anywhere/x") and is_allowed("s3://models/x") and is_allowed("s3://models")
    assert not is_allowed("http://anywhere/x") and not is_allowed("s3://models2/x") and not is_allowed("file:///x")


def test_the_error_tells_no_password_and_what_to_do(monkeypatch):
    monkeypatch.setenv(VARIABLE, "https://me:secret@server/models/")
    with pytest.raises(Refused, match=r"^https://other/x: .*SPILLWAY_REMOTE.*allows https://server/models/$"):
        check_allowed("https://you:password@other/x?signature=1", True)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(Refused, match=r"/etc/passwd: .*answers to other machines.*SPILLWAY_REMOTE=all"):
        check_allowed("file:///etc/passwd", False)


def test_azures_container_stands_where_others_have_a_login(monkeypatch):
    monkeypatch.setenv(VARIABLE, "abfs://models@a.dfs.core.windows.net/,sftp://nas/models/")
    assert is_allowed("abfs://models@a.dfs.core.windows.net/x.gguf")
    assert not is_allowed("abfs://private@a.dfs.core.windows.net/x.gguf")
    assert is_allowed("sftp://somebody:secret@nas/models/x.gguf")


def test_addresses_of_ipv6_are_no_chain_and_broken_ones_none(monkeypatch):
    for alone in (True, False):
        assert is_allowed("http://[::1]:8000/m.gguf", alone)
    assert not is_allowed("simplecache::http://[::1]/m.gguf", alone=False)
    monkeypatch.setenv(VARIABLE, "http://[fe80::2]/models/")
    assert is_allowed("http://[fe80::2]/models/x.gguf") and not is_allowed("http://[fe80::3]/models/x.gguf")
    assert not is_allowed("http://[fe80/models/x.gguf")
    assert without_secrets("http://me:secret@[::1]:80/a?sig=b::file:///c") == "http://[::1]:80/a::file:///c"
    assert "secret" not in without_secrets("http://me:secret@[abc")
    monkeypatch.setenv(VARIABLE, "http://[fe80")
    assert not is_allowed("http://[fe80::2]/models/x.gguf")
