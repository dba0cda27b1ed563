# SPDX-License-Identifier: Apache-2.0
"""Pushing to a stand-in for the Hub: what goes there, what is refused and when, what a second push adds."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from fake_hub import FakeHub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from run_folders import merged_run

from effsam3 import push
from effsam3.publish.release import ReleaseError
from effsam3.push import PushError
from effsam3.recipe.push import repository
from effsam3.recipe.reader import load_recipe


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return merged_run(tmp_path_factory.mktemp("runs"), "text")


@pytest.fixture
def folder(merged, tmp_path):
    """A merged run that a test may change, with results and a picture."""
    copy = Path(shutil.copytree(merged, tmp_path / merged.name))
    card = json.loads((copy / "merged/effsam3.json").read_text())
    made_by = {"started": card["provenance"]["started"], "weights": card["weights"]}
    for name in ("eval", "pictures"):
        (copy / name).mkdir()
    (copy / "eval/speed.json").write_text(json.dumps({"provenance": made_by}))
    (copy / "eval/summary.md").write_text("# title\n\n| ms |\n|---:|\n| 1 |\n")
    (copy / "pictures/one.png").write_bytes(b"not looked at")
    return copy


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that the client in this process takes for the Hub; constants are what it has read at its import."""
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield hub


def recipe_of(folder: Path, *overrides: str):
    return load_recipe(folder / "recipe.yaml", [f"train.runs={folder.parent}", *overrides])


def go(folder: Path, *overrides: str, **options):
    return push.run(recipe_of(folder, "push.repo=tester/model", *overrides), **options)


def content(folder: Path) -> dict[str, str]:
    """Every file but the two that a push may write, by its hash."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("README.md", "log.txt")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


EXPECTED = {
    *("README.md", "config.json", "effsam3.json", "model.safetensors", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "recipe.yaml", "provenance.json"),
    *("eval/speed.json", "eval/summary.md", "pictures/one.png"),
}


# ---- what goes there


def test_what_arrives_is_what_lies_here(folder, hub, capsys):
    assert go(folder) == f"{hub.url}/tester/model"
    repository = hub.repositories["tester/model"]
    assert repository.private and len(repository.commits) == 1
    files = repository.branches["main"]
    assert files.keys() == EXPECTED | {".gitattributes"}
    for name in EXPECTED:
        home = folder / name if (folder / name).is_file() else folder / "merged" / name
        assert files[name] == home.read_bytes(), name
    printed = capsys.readouterr().out
    assert len(re.findall(r"^ +[\d.]+ MB  \S+$", printed, re.M)) == 12 and "removed" not in printed
    assert printed.rstrip().endswith('predictor = Predictor("tester/model")')
    assert f"{hub.url}/tester/model\n" in printed


def test_a_dry_run_lists_the_same_and_asks_nobody(folder, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push.run(recipe_of(folder), dry_run=True) is None
    assert hub.requests == []
    printed = capsys.readouterr().out
    listed = dict(reversed(pair) for pair in re.findall(r"^ +([\d.]+) MB  (\S+)$", printed, re.M))
    assert listed.keys() == EXPECTED
    sizes = {name: (folder / "merged" / name).stat().st_size for name in ("model.safetensors", "README.md")}
    assert all(listed[name] == f"{size / 1e6:.3f}" for name, size in sizes.items())
    total = float(re.search(r"([\d.]+) MB  in 12 files; nothing was sent", printed)[1])
    assert total == pytest.approx(sum(map(float, listed.values())), abs=0.01)
    assert "OWNER/smoke-text, branch main, private" in printed and "push.repo=OWNER/NAME" in printed
    assert "# smoke-text" in (folder / "merged/README.md").read_text()


def test_results_of_another_merged_model_stay_at_home(folder, hub, capsys):
    result = json.loads((folder / "eval/speed.json").read_text())
    result["provenance"]["weights"] = "another model's"
    (folder / "eval/speed.json").write_text(json.dumps(result))
    go(folder)
    assert not [name for name in hub.repositories["tester/model"].branches["main"] if name.startswith("eval/")]
    assert f"left out {folder}/eval/speed.json" in capsys.readouterr().out


def test_a_public_repository_and_a_branch_only_when_asked_for(folder, hub, capsys):
    go(folder, "push.private=false", "push.revision=trial")
    repository = hub.repositories["tester/model"]
    assert not repository.private
    assert repository.branches["main"].keys() == {".gitattributes"}
    assert repository.branches["trial"].keys() == EXPECTED | {".gitattributes"}
    assert b'revision="trial"' in repository.branches["trial"]["README.md"]
    assert 'revision="trial")' in capsys.readouterr().out


def test_a_second_push_sends_what_is_new_and_removes_what_is_gone(folder, hub):
    go(folder)
    files = hub.repositories["tester/model"].branches["main"]
    files["notes.txt"], files["model-00001-of-00002.safetensors"] = b"mine", b"an old shard"
    before = len(hub.sent("PUT "))
    go(folder)
    assert len(hub.repositories["tester/model"].commits) == 2 and len(hub.sent("PUT ")) == before
    (folder / "pictures/one.png").unlink()
    (folder / "pictures/two.png").write_bytes(b"another")
    go(folder)
    files = hub.repositories["tester/model"].branches["main"]
    assert files.keys() == EXPECTED - {"pictures/one.png"} | {"pictures/two.png", "notes.txt", ".gitattributes"}
    assert len(hub.sent("PUT ")) == before + 1
    go(folder)  # nothing is new
    assert len(hub.repositories["tester/model"].commits) == 3


# ---- what is refused before anything is sent


def test_what_is_missing_is_named(folder, hub, monkeypatch):
    with pytest.raises(PushError, match="push.repo is not set; name where to: push.repo=OWNER/NAME"):
        push.run(recipe_of(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set"):
        go(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    with pytest.raises(PushError, match="no token for .+ is at hand; `hf auth login`"):
        go(folder)
    shutil.rmtree(folder / "merged")
    with pytest.raises(ReleaseError, match="merged is not there; run `effsam3 merge` first"):
        go(folder, dry_run=True)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_wrong", "tester/model", "push to tester/model: .+ answers 401 .+this token is not accepted"),
        ("hf_read", "tester/model", "push to tester/model: .+ answers 403 .+; a push takes a token with write"),
        ("hf_write", "other/model", "push to other/model: .+ answers 403 .+ with write access to other"),
    ],
)
def test_a_token_that_may_not_is_named_before_anything_is_read(folder, hub, monkeypatch, token, repo, message):
    monkeypatch.setenv("HF_TOKEN", token)
    before = content(folder)
    with pytest.raises(PushError, match=message):
        go(folder, f"push.repo={repo}")
    assert not (folder / "merged/README.md").exists() and content(folder) == before
    assert hub.sent("preupload|blobs") == []


def test_a_reader_of_somebodys_repository_may_not_write_there(folder, hub, monkeypatch):
    go(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    with pytest.raises(PushError, match="push to tester/model: .+ answers 403 .+this token may not do that"):
        go(folder)


def test_without_a_network(folder, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match=r"http://127.0.0.1:9 cannot be reached .ConnectError.+HTTPS_PROXY"):
        go(folder)


def test_a_public_repository_is_not_written_to_in_private(folder, hub):
    go(folder, "push.private=false")
    with pytest.raises(PushError, match="is there already and public, but push.private is true"):
        go(folder)


def test_another_model_is_not_overwritten(folder, hub):
    go(folder)
    files = hub.repositories["tester/model"].branches["main"]
    del files["effsam3.json"]
    with pytest.raises(PushError, match="holds a model that was not pushed from here"):
        go(folder)
    del files["model.safetensors"]  # a repository with a few words in it is no model
    go(folder)


def test_sam3s_weights_are_not_published_without_their_licence(folder, hub, tmp_path):
    card = json.loads((folder / "merged/effsam3.json").read_text()) | {"chassis": "facebook/sam3"}
    (folder / "merged/effsam3.json").write_text(json.dumps(card))
    with pytest.raises(ReleaseError, match="no copy of the SAM License.+push.license=FILE"):
        go(folder, "push.private=false")
    go(folder)  # in private, with a notice
    assert (
        b"put its full text in the place of this notice"
        in hub.repositories["tester/model"].branches["main"]["LICENSE"]
    )
    (tmp_path / "LICENSE").write_text("SAM License\n\u201cAgreement\u201d\n", encoding="utf-8")
    go(folder, "push.private=false", "push.repo=tester/public", f"push.license={tmp_path}/LICENSE")
    sent = hub.repositories["tester/public"].branches["main"]
    assert sent["LICENSE"] == (tmp_path / "LICENSE").read_bytes() and b"license_link: LICENSE" in sent["README.md"]


NAMES = [
    *("a/b", "team/es-rv-m", "Team_1/es.rv_m", "_a/b_", "a/" + "b" * 96, "a/b.gi"),
    *(
        "b",
        "a/b/c",
        "a/",
        "/b",
        "-a/b",
        "a/b-",
        ".a/b",
        "a/b.",
        "a/b--c",
        "a/b..c",
        "a/b.git",
        "a b/c",
        "a/" + "b" * 97,
    ),
    *("https://huggingface.co/a/b", "a/\u00fc"),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_that_the_hubs_client_accepts(name):
    try:
        validate_repo_id(name)
        accepted = name.count("/") == 1  # the owner must be said
    except HFValidationError:
        accepted = False
    assert (repository(name) == "") == accepted


# ---- when the Hub or the network fails


def test_a_push_that_fails_is_completed_by_the_next_one(folder, hub):
    hub.fail("/commit/", 503)
    before = content(folder)
    with pytest.raises(
        PushError, match="answers 503 .made to fail.: run the same command again later, what has arrived is kept"
    ):
        go(folder)
    assert hub.repositories["tester/model"].branches["main"].keys() == {".gitattributes"}
    assert content(folder) == before
    sent = len(hub.sent("PUT "))
    go(folder)
    assert len(hub.sent("PUT ")) == sent and EXPECTED < hub.repositories["tester/model"].branches["main"].keys()


def test_the_file_that_is_refused_is_named(folder, hub):
    hub.fail("/blobs/", *[403] * 9)  # storage refuses signed addresses that have run out
    with pytest.raises(PushError, match="Error while uploading '(pictures/one.png|model.safetensors)'.+answers 403"):
        go(folder)


def test_a_large_file_that_arrives_damaged_is_noticed(folder, hub):
    hub.fail("/verify", 422)
    with pytest.raises(PushError, match="answers 422 .made to fail"):
        go(folder)
    assert hub.repositories["tester/model"].commits == []
