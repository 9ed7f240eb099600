from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from echovideo.errors import StorageError
from pipelines.storage import NotFoundError, StorageOptions, StoragePath


@pytest.mark.parametrize(
    ("text", "part", "joined"),
    [
        ("s3://b/x/", "y", "s3://b/x/y"),
        ("s3://b", "x/y", "s3://b/x/y"),
        ("s3://b/x//z", "y", "s3://b/x//z/y"),
        ("/a/b/", "y", "/a/b/y"),
        ("file:///a%20b", "y", "/a b/y"),
        ("/", "y", "/y"),
    ],
)
def test_path_join_gives_exactly_one_slash(text: str, part: str, joined: str) -> None:
    path = StoragePath.parse(text) / part
    assert str(path) == joined
    assert path.name == "y"
    assert str((path / "q").parent) == joined


@pytest.mark.parametrize("part", ["../x", "a//b", "/a", "a/", ".", ""])
def test_path_join_with_an_unplain_part_is_an_assertion(part: str) -> None:
    with pytest.raises(AssertionError):
        StoragePath.parse("/a") / part


@pytest.mark.parametrize("text", ["http://x/y", "s3://", "s3:///key", "file://host/x", "", "a\0b"])
def test_parse_of_an_unusable_address_is_refused(text: str) -> None:
    with pytest.raises(StorageError):
        StoragePath.parse(text)


def test_parse_of_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(StoragePath.parse("runs")) == f"{tmp_path}/runs"


def test_path_after_pickling_is_small_and_reads_the_same(root: StoragePath) -> None:
    (root / "a").write_bytes(b"1")
    pickled = pickle.dumps(root)
    assert len(pickled) < 400
    copy = pickle.loads(pickled)
    assert copy == root
    assert hash(copy) == hash(root)
    assert (copy / "a").read_bytes() == b"1"


def test_path_in_a_new_process_reads_the_same(root: StoragePath) -> None:
    (root / "a").write_bytes(b"from the parent")
    code = "import pickle, sys; sys.stdout.buffer.write(pickle.load(sys.stdin.buffer).read_bytes())"
    child = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(root / "a"), capture_output=True, check=True
    )
    assert child.stdout == b"from the parent"


def test_write_read_stat_and_delete_agree(root: StoragePath) -> None:
    path = root / "a" / "b.bin"
    assert not path.exists()
    path.write_bytes(b"one")
    path.write_bytes(b"three")
    assert path.read_bytes() == b"three"
    assert path.stat().num_bytes == 5
    assert path.exists()
    assert not (root / "a").exists()
    path.delete()
    path.delete()
    assert not path.exists()


def test_read_range_is_that_part_of_the_content(root: StoragePath) -> None:
    path = root / "a"
    path.write_bytes(bytes(range(100)))
    assert path.read_range(0, 10) == bytes(range(10))
    assert path.read_range(90, 100) == bytes(range(90, 100))
    with pytest.raises(NotFoundError):
        (root / "b").read_range(0, 1)


def test_json_round_trip_keeps_unicode_and_order_free(root: StoragePath) -> None:
    path = root / "value.json"
    path.write_json({"b": [1, 2.5, None], "a": "\u4f60\u597d"})
    assert path.read_json() == {"a": "\u4f60\u597d", "b": [1, 2.5, None]}
    first = path.read_bytes()
    path.write_json({"a": "\u4f60\u597d", "b": [1, 2.5, None]})
    assert path.read_bytes() == first


def test_json_damaged_is_a_storage_error(root: StoragePath) -> None:
    (root / "value.json").write_bytes(b'{"a":')
    with pytest.raises(StorageError, match=r"value\.json") as caught:
        (root / "value.json").read_json()
    assert caught.value.code == "damaged"


def test_write_if_absent_second_write_leaves_the_first(root: StoragePath) -> None:
    path = root / "claim"
    assert path.write_if_absent(b"first")
    assert not path.write_if_absent(b"second")
    assert path.read_bytes() == b"first"


def test_write_if_absent_race_of_threads_has_one_winner(root: StoragePath) -> None:
    start = threading.Barrier(3)

    def write(name: str) -> bool:
        start.wait()
        return path.write_if_absent(name.encode() * 1000)

    with ThreadPoolExecutor(3) as pool:
        for race in range(5):
            path = root / f"race-{race}"
            won = dict(zip("abc", pool.map(write, "abc"), strict=True))
            assert sum(won.values()) == 1
            assert path.read_bytes() == next(name for name in won if won[name]).encode() * 1000


def test_write_if_absent_race_of_processes_has_one_winner(root: StoragePath) -> None:
    code = (
        "import os, pickle, sys\n"
        "path = pickle.load(sys.stdin.buffer)\n"
        "print(sum((path / str(i)).write_if_absent(str(os.getpid()).encode()) for i in range(20)))"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write(pickle.dumps(root))
        child.stdin.close()
    won = [int(child.stdout.read()) for child in children if child.stdout is not None]
    assert [child.wait() for child in children] == [0, 0]
    assert sum(won) == 20


def test_write_if_absent_repeated_after_a_lost_reply_counts_as_ours_on_s3(s3_root: StoragePath) -> None:
    assert (s3_root / "claim").write_if_absent(b"token 1")
    assert (s3_root / "claim").write_if_absent(b"token 1")


def test_write_interrupted_is_never_visible(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pipelines import storage\n"
        "storage.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
        "path = storage.StoragePath.parse(sys.argv[1])\n"
        "getattr(path, sys.argv[2])(b'x' * 100000)"
    )
    for method in ("write_bytes", "write_if_absent"):
        child = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a"), method])
        assert child.returncode == -9
    folder = StoragePath.parse(str(tmp_path))
    assert folder.list_names() == []
    assert folder.list_files() == []
    assert (folder / "a").write_if_absent(b"whole")
    assert [(file.path, file.num_bytes) for file in folder.list_files()] == [("a", 5)]


def test_listing_sees_each_change_and_no_neighbour(root: StoragePath) -> None:
    folder = root / "runs" / "ab"
    assert folder.list_names() == []
    assert folder.list_files() == []
    for name in ("1.json", "2.json", "deep/er/3.json"):
        (folder / name).write_bytes(b"12")
    (root / "runs" / "abc" / "4.json").write_bytes(b"")
    assert folder.list_names() == ["1.json", "2.json", "deep"]
    assert [(file.path, file.num_bytes) for file in folder.list_files()] == [
        ("1.json", 2),
        ("2.json", 2),
        ("deep/er/3.json", 2),
    ]
    (folder / "1.json").delete()
    assert folder.list_names() == ["2.json", "deep"]
    folder.delete_tree()
    assert folder.list_files() == []
    assert [file.path for file in root.list_files()] == ["runs/abc/4.json"]


def test_listing_longer_than_a_page_is_complete(s3_root: StoragePath) -> None:
    names = [f"{number:04d}" for number in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: (s3_root / name).write_bytes(b""), names))
    assert s3_root.list_names() == names
    assert [file.path for file in s3_root.list_files()] == names
    s3_root.delete_tree()
    assert s3_root.list_names() == []


def test_read_many_json_keeps_the_order(root: StoragePath) -> None:
    for number in range(20):
        (root / f"{number}.json").write_json(number)
    assert root.read_many_json([f"{number}.json" for number in (7, 3, 19)]) == [7, 3, 19]
    with pytest.raises(NotFoundError):
        root.read_many_json(["1.json", "no.json"])


def test_upload_and_download_give_the_same_bytes(root: StoragePath, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(range(256)) * 4096)
    (root / "video.mp4").upload_file(tmp_path / "in")
    (root / "video.mp4").download_file(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["in", "out"]


def test_missing_file_is_a_not_found_error_naming_it(root: StoragePath, tmp_path: Path) -> None:
    for read in (
        lambda: (root / "none").read_bytes(),
        lambda: (root / "none").stat(),
        lambda: (root / "none").download_file(tmp_path / "x"),
    ):
        with pytest.raises(NotFoundError, match="none"):
            read()
    assert not (tmp_path / "x").exists()


def test_missing_bucket_is_named_with_what_to_do(s3_options: StorageOptions) -> None:
    path = StoragePath.parse("s3://no-such-bucket/x", s3_options)
    for act in (path.read_bytes, path.list_names, lambda: path.write_bytes(b"x"), lambda: path.write_if_absent(b"x")):
        with pytest.raises(StorageError, match="create it or correct the address") as caught:
            act()
        assert caught.value.code == "no_such_bucket"


def test_refused_credentials_are_named_with_what_to_do(s3_root: StoragePath) -> None:
    code = (
        "import pickle, sys\n"
        "from echovideo.errors import StorageError\n"
        "try:\n    pickle.load(sys.stdin.buffer).write_bytes(b'x')\n"
        "except StorageError as error:\n    print(error.code, error)"
    )
    for environment, words in (
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "credentials refused"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_EC2_METADATA_DISABLED": "true"}, "no credentials found"),
    ):
        child = subprocess.run(
            [sys.executable, "-c", code],
            input=pickle.dumps(s3_root / "x"),
            capture_output=True,
            check=True,
            env={**os.environ, **environment},
        )
        assert child.stdout.decode().startswith(f"access_denied {s3_root}/x: {words}")


def test_unreachable_endpoint_is_an_error_within_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    path = StoragePath.parse("s3://b/x", StorageOptions(endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9 is up"):
        path.read_bytes()
