"""A mirror gives back what was sent, whole or not at all: on a server that speaks S3, and in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from servers import BUCKET, S3Server, killed_in_mid_upload, s3_server
from setwise.platform import storage
from setwise.platform.errors import ConfigError, DataError, UnreachableError
from setwise.platform.mirror import UNFINISHED, Mirror, open_mirror

MANIFEST = "manifest.json"
NAME = "data/pictures/prepared"


@pytest.fixture(params=["s3", "file"])
def mirror(request: pytest.FixtureRequest, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    """Empty, of the store `tmp_path / "store"`."""
    for name, value in s3.keys.items():
        monkeypatch.setenv(name, value)
    address = s3.address(f"{BUCKET}/{tmp_path.name}") if request.param == "s3" else (tmp_path / "far").as_uri()
    monkeypatch.setenv("SETWISE_MIRROR", address)
    opened = open_mirror(tmp_path / "store")
    assert opened is not None
    return opened


def write_folder(store: Path, content: str = "first", big: int = 0) -> Path:
    folder = store / NAME
    storage.write_bytes(folder / "train.parquet", b"x" * big + content.encode())
    storage.write_bytes(folder / "more" / "a.json", content.encode())
    storage.write_bytes(folder / ".lock", b"not for others")
    storage.write_json(folder / MANIFEST, {"content": content, "big": big})
    return folder


def accept(folder: Path) -> None:
    assert (folder / MANIFEST).is_file()


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def elsewhere(mirror: Mirror, store: Path) -> Mirror:
    """The same mirror as a machine with another, empty store has it."""
    opened = open_mirror(store)
    assert opened is not None and opened.address == mirror.address
    return opened


def test_a_folder_that_was_sent_is_fetched_by_another_store(mirror: Mirror, tmp_path: Path) -> None:
    folder = write_folder(mirror.store)
    assert mirror.push(NAME, MANIFEST)
    assert not mirror.push(NAME, MANIFEST), "it was there already"
    assert sorted(mirror.files(NAME)) == [MANIFEST, "more/a.json", "train.parquet"], "hidden files stay here"
    elsewhere(mirror, tmp_path / "other").pull(NAME, MANIFEST, accept)
    sent = content(folder)
    assert sent.pop(".lock")
    assert content(tmp_path / "other" / NAME) == sent
    assert mirror.names("data") == ["pictures"]


def test_a_changed_folder_replaces_the_one_that_is_there(mirror: Mirror, tmp_path: Path) -> None:
    folder = write_folder(mirror.store)
    mirror.push(NAME, MANIFEST)
    (folder / "more" / "a.json").unlink()
    storage.write_bytes(folder / "train.parquet", b"other")  # as long as it was: sizes do not tell
    storage.write_json(folder / MANIFEST, {"content": "other"})
    assert mirror.push(NAME, MANIFEST)
    assert sorted(mirror.files(NAME)) == [MANIFEST, "train.parquet"]
    assert mirror.read(f"{NAME}/train.parquet") == b"other"


def test_a_folder_without_its_manifest_does_not_exist(mirror: Mirror, tmp_path: Path) -> None:
    write_folder(mirror.store)
    mirror.write(f"{NAME}/train.parquet", b"first")
    other = elsewhere(mirror, tmp_path / "other")
    with pytest.raises(DataError, match="has no whole"):
        other.pull(NAME, MANIFEST, accept)
    assert not (tmp_path / "other" / NAME).exists()


def test_an_upload_that_was_killed_leaves_nothing_whole_and_goes_on(mirror: Mirror, tmp_path: Path) -> None:
    write_folder(mirror.store, big=30_000_000)
    push = "open_mirror(Path(sys.argv[2])).push(*sys.argv[3:])"
    killed_in_mid_upload("train.parquet", push, str(mirror.store), NAME, MANIFEST)
    there = mirror.files(NAME)
    assert UNFINISHED in there and MANIFEST not in there and "train.parquet" not in there
    with pytest.raises(DataError, match="has no whole"):
        elsewhere(mirror, tmp_path / "other").pull(NAME, MANIFEST, accept)
    mirror.write(f"{NAME}/more/a.json", b"FIRST")  # as long as it is here: what was sent is not sent again
    assert mirror.push(NAME, MANIFEST)
    assert mirror.read(f"{NAME}/more/a.json") == b"FIRST"
    assert sorted(mirror.files(NAME)) == [MANIFEST, "more/a.json", "train.parquet"]
    assert mirror.files(NAME)["train.parquet"] == 30_000_005


def test_what_a_killed_upload_of_another_content_left_is_not_mixed_in(mirror: Mirror, tmp_path: Path) -> None:
    write_folder(mirror.store, "older")
    mirror.write(f"{NAME}/{UNFINISHED}", (mirror.store / NAME / MANIFEST).read_bytes())
    mirror.write(f"{NAME}/train.parquet", b"older")
    write_folder(mirror.store, "newer")
    mirror.push(NAME, MANIFEST)
    assert mirror.read(f"{NAME}/train.parquet") == b"newer"


def test_a_folder_that_does_not_verify_is_refused_and_can_be_set_aside(mirror: Mirror, tmp_path: Path) -> None:
    write_folder(mirror.store)
    mirror.push(NAME, MANIFEST)

    def refuse(folder: Path) -> None:
        raise DataError(f"{folder / 'train.parquet'}: damaged")

    other = elsewhere(mirror, tmp_path / "other")
    with pytest.raises(DataError, match="damaged") as refused:
        other.pull(NAME, MANIFEST, refuse)
    assert f"{mirror.address}/{NAME}/train.parquet" in str(refused.value), "it says where the damaged file is"
    assert not (tmp_path / "other" / NAME).exists()
    other.set_aside(NAME, MANIFEST)
    with pytest.raises(DataError, match="has no whole"):
        other.pull(NAME, MANIFEST, accept)
    assert mirror.push(NAME, MANIFEST), "whoever has it whole puts it right"


def test_a_removed_folder_is_gone_and_removing_it_again_is_no_mistake(mirror: Mirror) -> None:
    write_folder(mirror.store)
    mirror.push(NAME, MANIFEST)
    mirror.remove(NAME, MANIFEST)
    mirror.remove(NAME, MANIFEST)
    assert mirror.files(NAME) == {} and mirror.read(f"{NAME}/{MANIFEST}") is None


def test_a_file_that_vanishes_while_it_is_sent_leaves_nothing_whole(mirror: Mirror) -> None:
    folder = write_folder(mirror.store)
    (folder / "gone.bin").symlink_to(folder / "nowhere")
    with pytest.raises(FileNotFoundError):
        mirror.push(NAME, MANIFEST)
    assert MANIFEST not in mirror.files(NAME)


def test_a_check_leaves_nothing_behind(mirror: Mirror) -> None:
    mirror.check()
    assert mirror.files("") == {}


def test_an_object_whose_name_leads_out_of_its_folder_is_refused(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.keys.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SETWISE_MIRROR", s3.address(f"{BUCKET}/evil"))
    mirror = open_mirror(tmp_path / "store")
    assert mirror is not None
    for key in (MANIFEST, "../../../../outside"):
        s3.client().put_object(Bucket=BUCKET, Key=f"evil/{NAME}/{key}", Body=b"{}")
    with pytest.raises(DataError, match="leads out of its folder"):
        mirror.pull(NAME, MANIFEST, accept)
    assert not list(tmp_path.glob("**/outside"))


def test_a_bucket_that_is_not_there_is_named_and_not_made(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.keys.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SETWISE_MIRROR", s3.address("no-such-bucket/prefix"))
    mirror = open_mirror(tmp_path)
    assert mirror is not None
    with pytest.raises(UnreachableError, match="s3://no-such-bucket/prefix: there is no such bucket"):
        mirror.check()
    assert [one["Name"] for one in s3.client().list_buckets()["Buckets"]] == [BUCKET]


def test_wrong_credentials_are_said_to_be_wrong_and_right_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server(tmp_path / "s3", BUCKET, knows_keys=True) as server:
        monkeypatch.setenv("SETWISE_MIRROR", server.address(BUCKET))
        for name, value in server.keys.items():
            monkeypatch.setenv(name, value)
        mirror = open_mirror(tmp_path)
        assert mirror is not None
        mirror.check()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
        stranger = open_mirror(tmp_path)
        assert stranger is not None
        for asked in (stranger.check, lambda: stranger.files(""), lambda: stranger.read("runs/a/config.yaml")):
            with pytest.raises(UnreachableError, match="refuses these credentials"):
                asked()


def test_a_server_that_is_not_there_is_said_to_be_away(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = S3Server(tmp_path)
    for name, value in gone.keys.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SETWISE_MIRROR", f"s3://{BUCKET}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{gone.host}")
    mirror = open_mirror(tmp_path)
    assert mirror is not None
    with pytest.raises(UnreachableError, match="it does not answer"):
        mirror.read("anything")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3.host}")
    mirror = open_mirror(tmp_path)
    assert mirror is not None
    mirror.check()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://key:secret@bucket/prefix", "has credentials in it"),
        ("s3://key@bucket", "has credentials in it"),
        ("s3://", "it can be s3://BUCKET"),
        ("ftp://host/folder", "it can be s3://BUCKET"),
        ("file://folder/of/a/host", "it can be s3://BUCKET"),
        ("/a/folder", "it can be s3://BUCKET"),
        ("s3://bucket?access_key=abc", "unknown option 'access_key'"),
        ("file:///folder?region=x", "unknown option 'region'"),
    ],
)
def test_an_address_that_cannot_be_one_is_refused_without_showing_a_secret(
    address: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SETWISE_MIRROR", address)
    with pytest.raises(ConfigError, match=said) as refused:
        open_mirror(tmp_path)
    assert "secret" not in str(refused.value) and "abc" not in str(refused.value)


def test_without_an_address_there_is_no_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SETWISE_MIRROR", raising=False)
    assert open_mirror(tmp_path) is None
