"""Layers in and out of files: .safetensors and .npz, read by other packages and by this one."""

import os
import subprocess
import sys

import numpy as np
import pytest
from test_checkpoints import DYADIC, a_bfloat16_layer, settled, trained, trained_arrays

import batchnorm as bn


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("affine", [True, False])
def test_files(tmp_path, suffix, affine):
    layers = {f"layer{i}.bn": trained(4 + i, seed=i, affine=affine) for i in range(3)}
    bn.save(tmp_path / f"model{suffix}", layers)
    others = {name: bn.BatchNorm(layer.num_features, affine=affine) for name, layer in layers.items()}
    bn.load(tmp_path / f"model{suffix}", others)
    for name, layer in layers.items():
        for key, v in layer.state_dict().items():
            np.testing.assert_array_equal(others[name].state_dict()[key], v)
    assert [p.name for p in tmp_path.iterdir()] == [f"model{suffix}"], "nothing else is left there"
    bn.save(tmp_path / f"one{suffix}", layers["layer0.bn"])
    bn.load(tmp_path / f"one{suffix}", others["layer0.bn"])


def test_a_model_of_pytorch_loads_by_prefix(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6))
    model(torch.randn(4, 3, 9, 9))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    layer = bn.BatchNorm(6)
    bn.load(tmp_path / "model.safetensors", {"1": layer})
    x = torch.randn(4, 6, 5, 5)
    model.eval(), layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(layer(x.numpy())), model[1](x))
    bn.save(tmp_path / "back.safetensors", {"1": layer})
    from safetensors.torch import load_file

    model[1].load_state_dict(
        {name.removeprefix("1."): v for name, v in load_file(tmp_path / "back.safetensors").items()}
    )


def broken(name, change):
    """A saved layer with one array changed, added or left out."""
    found = {f"bn.{n}": v for n, v in bn.to_state(trained(), "torch").arrays.items()}
    if change is None:
        del found[name]
    else:
        found[name] = change(found.get(name))
    return found


BREAKS = {
    "a wrong shape": ("bn.weight", lambda v: v[:3], "bn.weight: got shape"),
    "a wrong dtype": ("bn.weight", lambda v: v.astype(int), "bn.weight: got dtype int64"),
    "a negative variance": ("bn.running_var", lambda v: -v, "bn.running_var: got a variance below"),
    "not a number": ("bn.running_mean", lambda v: v * np.nan, "bn.running_mean: got a number that is"),
    "a name too few": ("bn.bias", None, "layers: got names"),
    "a name too many": ("bn.scale", lambda _: np.ones(6), "layers: got names"),
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("what", BREAKS)
def test_what_cannot_be_loaded_changes_nothing(tmp_path, what, suffix):
    name, change, message = BREAKS[what]
    path = tmp_path / f"broken{suffix}"
    found = broken(name, change)
    found |= {n.replace("bn.", "good."): v for n, v in broken("bn.weight", lambda v: v).items()}
    if suffix == ".npz":
        np.savez(path, **found)
    else:
        pytest.importorskip("safetensors.numpy").save_file(found, path)
    layers = {"good": trained(seed=5), "bn": trained(seed=6)}
    before = {n: {k: np.copy(v) for k, v in x.state_dict().items()} for n, x in layers.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        bn.load(path, layers)
    for n, layer in layers.items():
        for k, v in layer.state_dict().items():
            np.testing.assert_array_equal(v, before[n][k])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_that_is_cut(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    bn.save(path, trained())
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"path: got .*, which cannot be read \(.*expected a whole"):
            bn.load(path, bn.BatchNorm(6))


def test_pickles_are_not_read(tmp_path):
    np.savez(tmp_path / "model.npz", **(trained_arrays() | {"weight": np.array([object()] * 6)}))
    with pytest.raises(ValueError, match="path: got 'weight' in .*, which cannot be read"):
        bn.load(tmp_path / "model.npz", bn.BatchNorm(6))


def test_without_safetensors_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"not installed, expected it: pip install 'batchnorm\[safe"):
        bn.save(tmp_path / "model.safetensors", trained())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("library", ["torch", "jax.numpy"])
def test_bfloat16_in_files_is_float32(tmp_path, library, suffix):
    layer = a_bfloat16_layer(library)
    assert bn.to_state(layer, "keras").arrays["gamma"].dtype == np.float32
    path = tmp_path / f"model{suffix}"
    bn.save(path, layer)
    back, same = bn.BatchNorm(3), bn.BatchNorm(3, xp=pytest.importorskip(library), dtype=layer.dtype)
    bn.load(path, back)
    bn.load(path, same)
    np.testing.assert_array_equal(back.gamma, DYADIC)
    assert same.gamma.dtype == layer.gamma.dtype
    assert (same.gamma == layer.gamma).all()


def test_bfloat16_in_a_published_file(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    module = torch.nn.BatchNorm2d(3)
    with torch.no_grad():
        module.bias.copy_(torch.from_numpy(DYADIC))
    save_file(module.bfloat16().state_dict(), tmp_path / "model.safetensors")
    layer = bn.BatchNorm(3)
    bn.load(tmp_path / "model.safetensors", layer)
    np.testing.assert_array_equal(layer.beta, DYADIC)


def test_files_keep_all_digits_of_the_statistics(tmp_path):
    layer = settled(np.float32)
    mean = layer.running_mean.copy()
    assert not np.array_equal(mean, mean.astype(np.float32))
    bn.save(tmp_path / "model.npz", layer)
    with np.load(tmp_path / "model.npz") as file:
        np.testing.assert_array_equal(file["running_mean"], mean)
        assert file["weight"].dtype == np.float32


def test_only_what_is_wanted_is_read(tmp_path):
    """Arrays that NumPy cannot hold, or only by pickle, are no matter elsewhere in a file."""
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    arrays = trained_arrays("bn.")
    tensors = {name: torch.from_numpy(v) for name, v in arrays.items()}
    save_file(
        tensors | {"fc.weight": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors"
    )
    np.savez(tmp_path / "model.npz", **arrays, words=np.array(["a", None], object))
    for suffix in (".npz", ".safetensors"):
        layer = bn.BatchNorm(6)
        bn.load(tmp_path / f"model{suffix}", {"bn": layer})
        np.testing.assert_array_equal(layer.gamma, arrays["bn.weight"])
        assert layer.num_batches_tracked == 3


def test_an_array_that_cannot_be_read_is_named(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {name: torch.from_numpy(v) for name, v in trained_arrays("bn.").items()}
    tensors["bn.bias"] = tensors["bn.bias"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="path: got 'bn.bias' in .*model.safetensors, which cannot be"):
        bn.load(tmp_path / "model.safetensors", {"bn": bn.BatchNorm(6)})


def test_a_large_array_of_another_shape_is_not_read(tmp_path):
    """A few MB that unpack to gigabytes: the shape tells before that."""
    arrays = trained_arrays()
    path = tmp_path / "model.npz"
    np.savez_compressed(path, **(arrays | {"weight": np.zeros(2**27)}))  # 1 GB in 1 MB
    before = peak()
    with pytest.raises(ValueError, match=r"weight: got shape \(134217728,\), expected \(6,\)"):
        bn.load(path, bn.BatchNorm(6))
    assert peak() - before < 2**26
    tensors = arrays | {"bias": np.zeros((6, 10**6), np.float32)}
    pytest.importorskip("safetensors.numpy").save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"bias: got shape \(6, 1000000\), expected \(6,\)"):
        bn.load(tmp_path / "model.safetensors", bn.BatchNorm(6))


def peak():
    """The most memory that this process has had, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


ROUNDS, WRITERS = 15, 4
WRITE = """
import sys, time
import numpy as np
import batchnorm as bn

path, rounds, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
layer = bn.BatchNorm(50_000)
layer.gamma, layer.running_mean = np.full(50_000, float(number)), np.full(50_000, float(number))
for _ in range(rounds):
    bn.save(path, layer)
"""


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_several_processes_save_at_once(tmp_path, suffix):
    """Every rank of a job, say: each file that is ever seen is whole and one writer's own."""
    path = tmp_path / f"model{suffix}"
    bn.save(path, bn.BatchNorm(50_000))
    command = [sys.executable, "-c", WRITE, path, str(ROUNDS)]
    writers = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE) for i in range(WRITERS)]
    layer, seen = bn.BatchNorm(50_000), 0
    while any(writer.poll() is None for writer in writers):
        bn.load(path, layer)
        assert len({layer.gamma[0], *layer.gamma[::999], *layer.running_mean[::999]} - {0.0}) <= 1
        seen += 1
    assert seen > 1
    for writer in writers:
        assert writer.wait() == 0, writer.stderr.read().decode()
        writer.stderr.close()
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing else is left there"


@pytest.mark.skipif(os.name != "posix", reason="permissions and links as POSIX has them")
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_that_is_there_keeps_its_place_and_permissions(tmp_path, suffix):
    real, link = tmp_path / "folder" / f"model{suffix}", tmp_path / f"link{suffix}"
    real.parent.mkdir()
    own = real.with_name(f"model{suffix}.partial")
    own.write_text("the user's own")
    old = os.umask(0o027)
    try:
        bn.save(real, trained())
        assert real.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)
    real.chmod(0o604)
    link.symlink_to(real)
    bn.save(link, trained(seed=5))
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o604
    layer = bn.BatchNorm(6)
    bn.load(real, layer)
    np.testing.assert_array_equal(layer.gamma, trained(seed=5).gamma)
    long = tmp_path / f"{'a' * (250 - len(suffix))}{suffix}"
    bn.save(long, trained())
    assert long.exists()
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match=r"path: got \S*, a folder, expected a file"):
        bn.save(folder, trained())
    assert own.read_text() == "the user's own"
    assert sorted(p.name for p in real.parent.iterdir()) == [f"model{suffix}", f"model{suffix}.partial"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    bn.save(path, trained())
    whole = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="no space left"):
        bn.save(path, trained(seed=5))
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="path: got .*, expected a file in a folder that exists"):
        bn.save(tmp_path / "nowhere" / "model.npz", trained())


NAMES = {
    "one above others": {"": 4, "bn": 4},
    "one inside another": {"a": 4, "a.weight": 4},
    "a line break": {"a\nb": 4},
    "half a character": {"\ud800": 4},
    "a long one": {"a" * 70_000: 4},
}


@pytest.mark.parametrize("which", NAMES)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_names_that_could_not_be_loaded_are_not_saved(tmp_path, which, suffix):
    layers = {prefix: trained(n) for prefix, n in NAMES[which].items()}
    with pytest.raises(ValueError, match="layers: got (names|the prefix) "):
        bn.save(tmp_path / f"model{suffix}", layers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_any_other_names_come_back(tmp_path, suffix):
    prefixes = ["a", "b.c", "b.d", "é", "名", "a/b", "..", "file", "__metadata__", " ", "x" * 900]
    layers = {prefix: trained(3 + i, seed=i) for i, prefix in enumerate(prefixes)}
    bn.save(tmp_path / f"model{suffix}", layers)
    others = {prefix: bn.BatchNorm(3 + i) for i, prefix in enumerate(prefixes)}
    bn.load(tmp_path / f"model{suffix}", others)
    for prefix in prefixes:
        np.testing.assert_array_equal(others[prefix].gamma, layers[prefix].gamma)
