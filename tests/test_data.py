"""Fetching without a network: a stand-in for the package client, real archives, real failures. And pictures."""

import io
import json
import os
import shutil
import sys
import tarfile
import time
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from fastvit import _fetch, data
from fastvit._fetch import DataError, Package, fetch
from fastvit._pins import CIFAR10, PHOTOS, TRAINED_VIT

Image = pytest.importorskip("PIL.Image")

CONTENTS = {"things/one.bin": b"one" * 1000, "things/two.bin": b"two" * 5000}


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def package(client="pip", files=None) -> Package:
    files = files or {path: digest(content) for path, content in CONTENTS.items()}
    return Package("things", "1.0", client, 1, "some things", files)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "things-1.0"


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Stands in for pip and npm: copies an archive, or fails as told. Counts its calls."""

    class Client:
        calls = 0
        archive = tmp_path / "things-1.0-py3-none-any.whl"
        fails_with = ""

        def command(self, package, target):
            self.calls += 1
            if self.fails_with:
                return [sys.executable, "-c", f"import sys; print({self.fails_with!r}); sys.exit(1)"]
            return [sys.executable, "-c", f"import shutil; shutil.copy({str(self.archive)!r}, {str(target)!r})"]

    stand_in = Client()
    with zipfile.ZipFile(stand_in.archive, "w") as wheel:
        for path, content in CONTENTS.items():
            wheel.writestr(path, content)
    monkeypatch.setattr(_fetch, "_client_command", stand_in.command)
    return stand_in


def files_under(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


def test_fetch_checks_keeps_and_does_not_ask_again(cache, client):
    seen = []
    assert fetch(package(), progress=lambda *state: seen.append(state)) == cache
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == {
        Path(path).name: content for path, content in CONTENTS.items()
    }
    assert seen[-1] == ("things==1.0", 10**6, 10**6)
    assert fetch(package(), offline=True) == cache
    assert client.calls == 1


def test_fetch_reads_npm_tarballs(cache, client, tmp_path):
    client.archive = tmp_path / "things-1.0.tgz"
    with tarfile.open(client.archive, "w:gz") as tarball:
        for path, content in CONTENTS.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tarball.addfile(member, io.BytesIO(content))
    fetch(package("npm"))
    assert (cache / "two.bin").read_bytes() == CONTENTS["things/two.bin"]


def test_a_wrong_checksum_is_named_and_nothing_is_kept(cache, client):
    changed = package(files={"things/one.bin": digest(CONTENTS["things/one.bin"]), "things/two.bin": "0" * 64})
    with pytest.raises(DataError, match=r"two\.bin of things==1\.0 has sha256 .*, expected 0000") as error:
        fetch(changed)
    assert "Run this again" in str(error.value)
    assert files_under(cache) == []


def test_a_truncated_archive_leaves_nothing(cache, client):
    whole = client.archive.read_bytes()
    client.archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is damaged"):
        fetch(package())
    assert files_under(cache) == []


def test_an_archive_without_the_file_leaves_nothing(cache, client):
    with pytest.raises(DataError, match=r"damaged .*three\.bin"):
        fetch(package(files={"things/three.bin": "0" * 64}))
    assert files_under(cache) == []


def test_the_clients_own_error_is_passed_on_with_the_way_to_retry(cache, client):
    client.fails_with = "WARNING: slow\nERROR: No matching distribution found for things==1.0.\nnotice: new version"
    with pytest.raises(DataError) as error:
        fetch(package())
    assert "No matching distribution found" in str(error.value)
    assert "`pip download --no-deps things==1.0`" in str(error.value)
    assert files_under(cache) == []


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("npm error code E404\nnpm error 404 Not Found\nnpm error 404 at once", "npm error 404 Not Found"),
        ("WARNING: Retrying after connection broken by 'X'\nERROR: No match", "no connection (ERROR: No match)"),
        ("Killed", "Killed"),
        ("", "it said nothing"),
    ],
)
def test_the_telling_line_is_found(said, reason):
    assert _fetch._reason(said) == reason


def test_a_file_that_changed_in_the_cache_is_fetched_anew(cache, client):
    fetch(package())
    (cache / "one.bin").write_bytes(b"rot")
    with pytest.raises(DataError, match=r"one\.bin has a wrong checksum in .* --offline forbids"):
        fetch(package(), offline=True)
    fetch(package())
    assert (cache / "one.bin").read_bytes() == CONTENTS["things/one.bin"]


def test_offline_without_a_cache_says_what_is_missing_and_writes_nothing(cache):
    with pytest.raises(DataError, match=r"some things: one\.bin is not in .*Run once without --offline"):
        fetch(package(), offline=True)
    assert not cache.exists()


def test_files_of_an_installed_package_are_used_where_they_are(cache, tmp_path, monkeypatch):
    for path, content in CONTENTS.items():
        (tmp_path / "site" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / path).write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert fetch(package(), offline=True) == tmp_path / "site" / "things"


def test_a_full_disk_is_told_before_the_download(cache, client, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"0 MB free, things==1\.0 needs 3 MB"):
        fetch(package())
    assert client.calls == 0


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, client):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot write .*set FASTVIT_CACHE"):
        fetch(package())


def test_leftovers_of_a_killed_download_go_with_the_next_one(cache, client):
    for name, age in ((".part-old", 100_000), (".part-young", 10)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    fetch(package())
    assert sorted(path.name for path in cache.iterdir()) == [".part-young", "one.bin", "two.bin"]


def test_npm_missing_is_told_with_what_needs_it(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match=r"npm is not on the PATH, and things@1\.0 comes from npm only"):
        fetch(package("npm"))


def test_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.setenv("FASTVIT_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert data.cache_dir() == Path("/one")
    monkeypatch.delenv("FASTVIT_CACHE")
    assert data.cache_dir() == Path("/two/fastvit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_dir() == Path.home() / ".cache" / "fastvit"


def test_every_pinned_file_has_a_checksum_and_the_misfit_photo_is_left_out():
    for pinned in (TRAINED_VIT, PHOTOS, CIFAR10):
        assert all(len(value) == 64 for value in pinned.files.values())
    assert len(PHOTOS.files) == 19
    assert not [path for path in PHOTOS.files if path.endswith("_741.jpg")]


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "report.json"
    target.write_text("old")

    def fail_half_way():
        with data.atomic_write(target) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert target.read_text() == "old"
    assert files_under(tmp_path) == ["report.json"]


def test_cifar10_rows_become_pictures(tmp_path, monkeypatch):
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.view(3, 1024, 3).numpy()).save(tmp_path / "test_batch.png")
    (tmp_path / "test_lables.json").write_text(json.dumps([3, 8, 1]))
    monkeypatch.setattr(data, "fetch", lambda *args, **kwargs: tmp_path)
    images, labels = data.cifar10("test")
    assert torch.equal(images, pixels.permute(0, 3, 1, 2))
    assert labels.tolist() == [3, 8, 1]
    assert torch.equal(data.cifar10("test", 2)[0], images[:2])
    with pytest.raises(ValueError, match="split is 'validation'"):
        data.cifar10("validation")


def test_preprocess_scales_the_shorter_side_and_cuts_the_middle():
    picture = Image.new("RGB", (300, 100), (255, 0, 0))
    picture.paste((0, 0, 255), (100, 0, 200, 100))  # the middle third
    (pixels,) = data.preprocess([picture], 50)
    assert pixels.shape == (3, 50, 50)
    assert pixels[:, :, 3:-3].unique(dim=1).unique(dim=2).flatten().tolist() == [0, 0, 255]
    whole = data.preprocess([picture.crop((100, 0, 200, 100))], 100)[0]
    assert whole.is_contiguous()
    assert (whole == torch.tensor([0, 0, 255], dtype=torch.uint8).view(3, 1, 1)).all()


def test_preprocess_agrees_with_pillow_pixel_by_pixel():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 256, (90, 61, 3), dtype=torch.uint8, generator=generator).numpy()
    picture = Image.fromarray(noise)
    expected = picture.resize((64, round(90 * 64 / 61)), Image.Resampling.BICUBIC)
    top = (expected.height - 56) // 2
    expected = expected.crop((4, top, 60, top + 56))
    (pixels,) = data.preprocess([picture], 56, crop_pct=0.875)
    assert pixels.permute(1, 2, 0).numpy().tobytes() == expected.tobytes()


def test_normalize_is_the_usual_formula():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [
        (value / 255 - mean) / std
        for value, mean, std in zip((0, 128, 255), data.IMAGENET_MEAN, data.IMAGENET_STD, strict=True)
    ]
    torch.testing.assert_close(data.normalize(pixels).flatten(), torch.tensor(expected))


def test_resize_keeps_flat_pictures_flat():
    flat = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8)
    assert torch.equal(data.resize(flat, 112), torch.full((2, 3, 112, 112), 200, dtype=torch.uint8))


def test_open_picture_turns_it_upright_and_into_rgb(tmp_path):
    left_is_red = Image.new("RGB", (40, 20), (255, 0, 0))
    left_is_red.paste((0, 0, 255), (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    left_is_red.save(tmp_path / "turned.png", exif=exif)
    upright = data.open_picture(tmp_path / "turned.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 0, 0)

    for mode in ("L", "P", "RGBA", "1", "LA"):
        Image.new(mode, (8, 8)).save(tmp_path / "other.png")
        assert data.open_picture(tmp_path / "other.png").mode == "RGB"


def test_open_picture_scales_16_bits(tmp_path):
    import numpy as np

    Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert data.open_picture(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"truncated"])
def test_open_picture_names_the_file_and_the_reason(tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content == b"truncated":
        Image.effect_noise((64, 64), 50).save(path)
        content = path.read_bytes()[:600]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.jpg: not a readable picture: ."):
        data.open_picture(path)


def test_open_picture_of_nothing_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jpg: not a readable picture: No such file"):
        data.open_picture(tmp_path / "none.jpg")


def test_find_pictures_opens_folders(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).write_text("")
    assert [path.name for path in data.find_pictures([tmp_path, "x.png"])] == ["a.JPG", "b.png", "x.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no picture in this folder"):
        data.find_pictures([tmp_path / "empty"])
