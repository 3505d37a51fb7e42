"""Weights files: fetched from a server of this machine, read without running what they carry, told apart."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import pickle
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from segment_anything import sam_model_registry

import wesam.sam
from wesam.cli import main
from wesam.errors import InputError
from wesam.sam import REGISTRY, checkpoints, describe, fetch_model, load_sam
from wesam.sam.tiny import build_tiny, from_mobile_sam

CONTENT = bytes(range(256)) * 12_000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; breaks off after ``cut`` bytes of an answer, as often as ``cuts``; may know no ranges."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut, self.cuts, self.ranges, self.content = 0, 0, True, CONTENT
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        s, asked = self.server, self.headers.get("Range")
        s.asked.append(asked)
        if self.path != "/weights.pth":
            self.send_error(404)
            return
        begin = int(re.findall(r"\d+", asked)[0]) if asked and s.ranges else 0
        if begin and begin >= len(s.content):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(s.content) - begin))
        self.end_headers()
        if s.cuts:
            s.cuts -= 1
            self.wfile.write(s.content[begin : begin + s.cut])
        else:
            self.wfile.write(s.content[begin:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.05,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_a_file_is_fetched_into_a_folder_that_was_not_there(server: Server, tmp_path: Path) -> None:
    checkpoints.fetch(server.url, path := tmp_path / "a" / "b" / "weights.pth", DIGEST)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_a_broken_connection_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.cut, server.cuts = 1_000_000, 2
    checkpoints.fetch(server.url, path := tmp_path / "weights.pth", DIGEST)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-", "bytes=2000000-"]


def test_what_an_earlier_run_left_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.cut, server.cuts = 500_000, 99
    with pytest.raises(InputError, match=r"broke off.*the same command goes on"):
        checkpoints.fetch(server.url, path := tmp_path / "weights.pth", DIGEST)
    assert not path.exists()
    server.cuts, server.asked = 0, []
    checkpoints.fetch(server.url, path, DIGEST)
    assert path.read_bytes() == CONTENT
    assert server.asked == ["bytes=2500000-"]


def test_a_whole_file_that_was_not_moved_into_place_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.pth.part").write_bytes(CONTENT)
    checkpoints.fetch(server.url, path := tmp_path / "weights.pth", DIGEST)
    assert path.read_bytes() == CONTENT


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cut, server.cuts = False, 1_000_000, 1
    checkpoints.fetch(server.url, path := tmp_path / "weights.pth", DIGEST)
    assert path.read_bytes() == CONTENT


def test_a_wrong_file_never_stays(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(InputError, match=r"SHA-256.*deleted"):
        checkpoints.fetch(server.url, tmp_path / "weights.pth", DIGEST)
    assert not list(tmp_path.iterdir())


def test_a_file_there_already_is_replaced_only_if_it_is_another(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WESAM_HOME", str(tmp_path))
    entry = replace(REGISTRY["vit_b"], url=server.url, sha256=DIGEST)
    monkeypatch.setitem(wesam.sam.REGISTRY, "vit_b", entry)
    entry.path.write_bytes(CONTENT)
    fetch_model("vit_b")
    assert not server.asked
    entry.path.write_bytes(b"something else")
    assert fetch_model("vit_b").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("url", "said"), [("http://127.0.0.1:9/weights.pth", "refused"), ("{server}x", "404")], ids=["no server", "no file"]
)
def test_without_the_server_one_line_says_what_to_do(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str,
    said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("WESAM_HOME", str(tmp_path))
    url = url.replace("{server}", server.url)
    monkeypatch.setitem(wesam.sam.REGISTRY, "vit_b", replace(REGISTRY["vit_b"], url=url))
    assert main(["fetch", "vit_b"]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1
    assert url in printed[0]
    assert said in printed[0]
    assert str(tmp_path / "sam_vit_b_01ec64.pth") in printed[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("home", ["file", "file/below", "link"])
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/proc/nowhere")
    monkeypatch.setenv("WESAM_HOME", str(tmp_path / home))
    assert main(["fetch", "vit_b"]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1
    assert f"cannot write {tmp_path / home}" in printed[0]
    assert "$WESAM_HOME" in printed[0]


def test_two_processes_do_not_fetch_one_file_at_once(server: Server, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "weights.pth.part").open("ab") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process"):
            checkpoints.fetch(server.url, tmp_path / "weights.pth", DIGEST)


class Evil:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path(self.path),)  # type: ignore[return-value]


def test_a_checkpoint_that_carries_code_is_refused(tmp_path: Path) -> None:
    torch.save({"a": Evil(tmp_path / "ran")}, path := tmp_path / "evil.pth")
    with pytest.raises(InputError, match="carries code"):
        load_sam(str(path))
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"evil\.pth"):
        load_sam(str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    (path := tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_sam(str(path))
    if path.suffix == ".pth":
        torch.save({"a": torch.zeros(100_000)}, path)
        path.write_bytes(path.read_bytes()[:200_000])
        with pytest.raises(InputError, match="damaged"):
            load_sam(str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x80\x02", b"i\n.", b"g0\n.", b"(lp0\n0.", b"\x80\x02h\x05.", b"\x80\x02J\x01.", b"\x80\x02]K\x01s.",
        b"\x80\x02K\x01b.",
    ],
)  # fmt: skip
def test_a_file_of_any_bytes_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (path := tmp_path / "junk.pth").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))) as told:
        checkpoints.read_weights(path)
    assert len(str(told.value).splitlines()) == 1


def test_random_damages_of_a_checkpoint_are_refused_in_one_line_or_read(tmp_path: Path) -> None:
    path, rng = tmp_path / "junk.pth", random.Random(0)
    torch.save({"a": torch.zeros(3), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole[: rng.randrange(len(whole)) if rng.random() < 0.3 else None])
        for _ in range(rng.randrange(4)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):
            checkpoints.read_weights(path)


def test_names_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WESAM_HOME", str(tmp_path))
    with pytest.raises(InputError, match="did you mean 'nano'"):
        load_sam("nanno")
    with pytest.raises(InputError, match=r"no weights file .*absent\.pth"):
        load_sam(str(tmp_path / "absent.pth"))
    with pytest.raises(InputError, match="wesam fetch vit_b") as told:
        load_sam("vit_b")
    assert REGISTRY["vit_b"].url in str(told.value)
    assert str(tmp_path) in str(told.value)


def test_another_file_under_a_published_name_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WESAM_HOME", str(tmp_path))
    REGISTRY["vit_b"].path.write_bytes(b"something else")
    with pytest.raises(InputError, match="not the file published as vit_b"):
        load_sam("vit_b")


def test_a_file_says_which_model_it_is(tmp_path: Path) -> None:
    state = load_file(REGISTRY["nano"].path)
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, path := tmp_path / "mine.pth")
    sam = load_sam(str(path))
    assert all(torch.equal(v, state[k].float()) for k, v in sam.state_dict().items())
    assert str(sam.name_or_path).startswith("nano-")
    assert sam.name_or_path != load_sam("nano").name_or_path


def test_weights_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    state = load_file(REGISTRY["nano"].path)
    left = {k: v for k, v in state.items() if k != "image_encoder.pos_embed"}
    left["image_encoder.extra"] = torch.zeros(1)
    left["mask_decoder.iou_token.weight"] = torch.zeros(1, 7)
    save_file(left, path := tmp_path / "nearly.safetensors")
    with pytest.raises(InputError) as told:
        load_sam(str(path))
    assert re.search(
        r"weights of nano: it lacks image_encoder.pos_embed; it has left over image_encoder.extra; "
        r"other shapes have mask_decoder.iou_token.weight$",
        str(told.value),
    )
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="of no model here"):
        load_sam(str(path))


def test_published_checkpoints_are_told_apart_by_their_keys_and_shapes() -> None:
    for name in ("vit_b", "vit_l", "vit_h"):
        with torch.device("meta"):
            state = sam_model_registry[name]().state_dict()
        assert wesam.sam._identify(state, Path("x")) == name
    assert {n: describe(n)[1] for n in REGISTRY} == {"nano": 192} | dict.fromkeys(
        ("vit_t", "vit_b", "vit_l", "vit_h"), 1024
    )


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names that mobile_sam.pt has."""
    out = {}
    for k, v in state.items():
        new = k.replace("encoder.stages.", "encoder.layers.").replace(".conv.", ".c.")
        new = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", new)
        new = new.replace("patch_embed.conv1.", "patch_embed.seq.0.").replace(
            "patch_embed.conv2.", "patch_embed.seq.2."
        )
        out[new] = v
    return out | {"image_encoder.norm_head.weight": torch.zeros(320), "image_encoder.head.bias": torch.zeros(1000)}


def test_mobile_sam_loads_from_its_own_key_layout() -> None:
    sam = build_tiny(64)
    state = sam.state_dict()
    theirs = published(state)
    for key in (  # of the published file
        "image_encoder.patch_embed.seq.2.bn.running_var", "image_encoder.layers.0.blocks.1.conv3.c.weight",
        "image_encoder.layers.0.downsample.conv2.c.weight", "image_encoder.layers.2.downsample.conv1.bn.bias",
        "image_encoder.layers.2.blocks.5.attn.attention_biases", "image_encoder.layers.3.blocks.1.local_conv.c.weight",
        "image_encoder.layers.3.blocks.0.mlp.fc1.weight", "image_encoder.neck.3.bias",
    ):  # fmt: skip
        assert key in theirs
    ours = from_mobile_sam(theirs)
    assert list(ours) == list(state)
    assert all(torch.equal(ours[k], v) for k, v in state.items())
    assert from_mobile_sam(ours) is ours


def test_mobile_sam_sees_one_cell_in_sixteen_pixels() -> None:
    torch.manual_seed(0)
    encoder = build_tiny(128).image_encoder.eval()
    with torch.no_grad():
        images = torch.randn(1, 3, 128, 128)
        assert encoder(images).shape == (1, 256, 8, 8)
