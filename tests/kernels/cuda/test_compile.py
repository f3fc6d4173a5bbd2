"""The CUDA sources under the real compilers: nvcc without spills and with few instructions, NVRTC into the cache."""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import host_build
import pytest

from zsad.kernels.cuda import device as cuda_device
from zsad.kernels.cuda.comparers import OWN_ROWS, strip_rows
from zsad.kernels.cuda.model import INSTRUCTIONS

NVCC, CUOBJDUMP = shutil.which("nvcc"), shutil.which("cuobjdump")
TARGETS = ("80", "86", "89", "90a", "100", "120")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ +)?([^;]*);")
HEAVIEST = (15, 23, 27, 28, 29, 30, 31)  # masks of filter_max
SOURCES = sorted(path.stem for path in cuda_device.FOLDER.glob("*.cu"))


def nvcc_version() -> tuple[int, ...]:
    assert NVCC
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    assert release, said
    return tuple(int(part) for part in release.groups())


def known_targets() -> list[str]:
    """Return the targets that this nvcc knows."""
    return [target for target in TARGETS if len(target) < 3 or target == "90a" or nvcc_version() >= (12, 8)]


def test_compute_capability_9_has_warpgroups() -> None:
    assert {cuda_device.architecture(capability) for capability in ("80", "89", "90", "100", "120")} == {
        *("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
    }


def test_every_source_has_kernels_that_are_found_by_name() -> None:
    for source in SOURCES:
        kernels = cuda_device.kernels_of(cuda_device.sources(source)[f"{source}.cu"])
        assert kernels
        assert {cuda_device.build_of(kernel) for kernel in kernels} == {(source, ())}
    assert cuda_device.build_of("filter_max_10") == ("filter_max", ("ZSAD_MASK=10",))
    assert cuda_device.build_of("filter_max_near_3") == ("filter_max", ("ZSAD_NEAR_MASK=3",))
    with pytest.raises(KeyError):
        cuda_device.build_of("abacus")


def once(command: list[str], source: Path, made: Callable[[], str]) -> str:
    """Return a text that is made of a source by a command, or what was made of the same before."""
    texts = [path.read_text("utf-8") for path in (source, *sorted(cuda_device.FOLDER.glob("*.h")))]
    words = [word for word in command if not word.startswith("/")]  # options, not places
    path = host_build.CACHE / f"nvcc-{host_build.digest(str(nvcc_version()), *words, *texts)}.txt"
    if not path.exists():
        text = made()
        host_build.CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=host_build.CACHE, delete=False) as draft:
            draft.write(text)
        Path(draft.name).replace(path)
    return path.read_text("utf-8")


def compile_without_spills(source: Path, folder: Path, *defines: str) -> None:
    """Compile a source for all targets; raises AssertionError where that takes a warning or a spilled register."""
    targets = known_targets()
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    options = ["-fatbin", "-std=c++17", "-O3", "-Xptxas", "-v", "--threads", "2", f"-I{cuda_device.FOLDER}"]
    command = [str(NVCC), *(f"-D{define}" for define in defines), *options, *codes]

    def compiled() -> str:
        done = subprocess.run(
            [*command, "-o", str(folder / "kernels.fatbin"), str(source)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    said = once(command, source, compiled)
    assert "warning" not in said, said
    assert "Potential Performance Loss" not in said, said  # as where products wait for each other
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) % len(targets) == 0
    assert len(spills) >= len(targets)
    assert set(spills) == {("0", "0")}, said


@pytest.mark.long
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", SOURCES)
def test_nvcc_compiles_every_target_without_spills(source: str, tmp_path: Path) -> None:
    compile_without_spills(cuda_device.FOLDER / f"{source}.cu", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("mask", [3, 7, *HEAVIEST])
def test_degrees_that_are_compiled_when_first_asked_for_do_not_spill(mask: int, tmp_path: Path) -> None:
    """The first are those of the presets' windows, the others take the most registers."""
    text = (cuda_device.FOLDER / "filter_max.cu").read_text("utf-8")
    alone = tmp_path / "alone.cu"  # without the masks that are always there
    alone.write_text(re.sub(r"^ZSAD_FILTER_MAX\(\d+\).*$", "", text, flags=re.MULTILINE), "utf-8")
    compile_without_spills(alone, tmp_path, f"ZSAD_MASK={mask}", f"ZSAD_NEAR_MASK={mask}")


def machine_code(source: str, target: str, folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Return the instructions of every kernel of a source, each with its place."""
    if target not in known_targets():
        pytest.skip("this nvcc does not know the target")
    cubin = folder / f"{source}.cubin"
    path = cuda_device.FOLDER / f"{source}.cu"
    command = [str(NVCC), "-cubin", "-std=c++17", "-O3", f"-arch=sm_{target}"]

    def dumped() -> str:
        subprocess.run([*command, "-o", str(cubin), str(path)], check=True)
        return subprocess.run([str(CUOBJDUMP), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout

    said = once(command, path, dumped)
    functions = said.split("Function : ")[1:]
    return {each.split()[0]: [(int(at, 16), text) for at, text in INSTRUCTION.findall(each)] for each in functions}


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """Return the instructions of every loop, those of the loops in it among them."""
    found = []
    for at, text in code:
        back = re.match(r"BRA\S*\s+(?:\S+,\s*)*0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < at:
            found.append([said for place, said in code if int(back[1], 16) <= place <= at])
    return found


def main_loop(code: list[tuple[int, str]]) -> list[str]:
    """Return the innermost loop that loads entries and reduces them over the warp."""
    wanted = [
        loop
        for loop in loops(code)
        if any("LDG" in said for said in loop) and any(re.match(r"C?REDUX", said) for said in loop)
    ]
    return min(wanted, key=len)


def test_the_main_loop_is_the_inner_one_that_loads_and_reduces() -> None:
    code = ["MOV R1, R2", "LDG.E R1, [R2.64]", "REDUX.MAX.S32 UR4, R1", "BRA 0x10", "MOV R3, R1", "BRA 0x40", "BRA 0x0"]
    assert main_loop([(16 * at, text) for at, text in enumerate(code)]) == code[1:4]


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason="nvcc is not installed")
@pytest.mark.skipif(not CUOBJDUMP, reason="cuobjdump is not installed: pip install nvidia-cuda-cuobjdump")
@pytest.mark.parametrize("target", TARGETS)
def test_instructions_of_filter_max_an_entry(target: str, tmp_path: Path) -> None:
    functions = machine_code("filter_max", target, tmp_path)
    for mask, most in INSTRUCTIONS.items():
        each = len(main_loop(functions[cuda_device.filter_max_kernel(mask)])) / (OWN_ROWS * strip_rows(mask))
        assert each <= most, f"mask {mask}: {each:.1f} instructions an entry"
        if target == "89":  # which the model is about
            assert each > most - 2, f"mask {mask}: only {each:.1f} instructions an entry; lower the bound"


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason="nvcc is not installed")
@pytest.mark.skipif(not CUOBJDUMP, reason="cuobjdump is not installed: pip install nvidia-cuda-cuobjdump")
def test_instructions_of_tiles_are_those_that_the_source_counts(tmp_path: Path) -> None:
    def all_loops(target: str) -> list[list[str]]:
        return sorted(loops(machine_code("tiled", target, tmp_path)["tiled_max"]), key=len)

    def shortest(loops: list[list[str]], count: int, *names: str) -> list[int]:
        having = [loop for loop in loops if all(any(re.match(name, said) for said in loop) for name in names)]
        return [len(loop) for loop in having[:count]]

    found = all_loops("90a")
    warps, groups = shortest(all_loops("80"), 1, "HMMA"), shortest(found, 1, "HGMMA")
    columns = shortest(found, 3, "LDS[^M]", "STS")
    rows = [min(len(loop) for loop in found if sums_fours(loop, reach)) for reach in range(3)]
    for counted, most in ((warps, [159]), (groups, [102]), (columns, [14, 23, 35]), (rows, [53, 78, 113])):
        assert all(each <= bound for each, bound in zip(counted, most, strict=True)), counted


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason="nvcc is not installed")
@pytest.mark.skipif(not CUOBJDUMP, reason="cuobjdump is not installed: pip install nvidia-cuda-cuobjdump")
def test_a_step_is_four_products_of_a_warpgroup(tmp_path: Path) -> None:
    for source, kernels in {
        "fused": {"fused_max_f16": "HGMMA.64x128x16.F32", "fused_max_s8": "IGMMA.64x128x32.S8.S8"},
        "tiled": {"tiled_max": "HGMMA.64x128x16.F32"},
    }.items():
        code = machine_code(source, "90a", tmp_path)
        for kernel, instruction in kernels.items():
            everything = [said.split()[0] for _, said in code[kernel]]
            (step,) = [loop for loop in loops(code[kernel]) if any("GMMA" in said for said in loop)]
            assert [said.split()[0] for said in step if "MMA" in said] == 4 * [instruction], kernel
            assert sum("MMA" in said for said in everything) == 4  # nor does any other way to multiply remain
            assert not any(said.startswith(("LDSM", "LDL", "STL")) for said in everything)


def sums_fours(loop: list[str], reach: int) -> bool:
    """Tell whether a loop loads the vectors of a window sum and reduces the result over the warp."""
    loads = sum(said.startswith("LDS.128") for said in loop)
    return loads == 2 * reach + 1 and any(re.match(r"C?REDUX", said) for said in loop)


def test_a_fatbin_counts_only_for_the_sources_it_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("pooled_norms.cu", "device.h"):
        shutil.copy(cuda_device.FOLDER / file, tmp_path / file)
    monkeypatch.setattr(cuda_device, "FOLDER", tmp_path)
    assert cuda_device.prebuilt("pooled_norms") is None
    (tmp_path / "pooled_norms.fatbin").write_bytes(b"")
    # As `cmake -E sha256sum` writes it.
    sums = [
        f"{hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()}  {file}\n"
        for file in ("pooled_norms.cu", "device.h")
    ]
    (tmp_path / "pooled_norms.sha256").write_text("".join(sums), "utf-8")
    assert cuda_device.prebuilt("pooled_norms") == tmp_path / "pooled_norms.fatbin"
    with (tmp_path / "device.h").open("a") as header:
        header.write("// changed\n")
    assert cuda_device.prebuilt("pooled_norms") is None


def check_elf(content: bytes) -> None:
    """Make sure that the program headers, which come last in a cubin, are all there."""
    assert content[:5] == b"\x7fELF\2"
    start, size, count = struct.unpack_from("<Q", content, 32) + struct.unpack_from("<HH", content, 54)
    assert len(content) == start + size * count


def test_a_cubin_gets_back_the_byte_that_cupy_drops() -> None:
    whole = b"\x7fELF\2".ljust(32, b"\0") + struct.pack("<Q", 64)
    whole = whole.ljust(54, b"\0") + struct.pack("<HH", 56, 1)
    whole = whole.ljust(64 + 56, b"\0")
    assert cuda_device.whole_elf(whole[:-1]) == whole
    assert cuda_device.whole_elf(whole) == whole
    check_elf(cuda_device.whole_elf(whole[:-1]))
    with pytest.raises(AssertionError):
        check_elf(whole[:-1])


def test_nvrtc_compiles_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path))
    paths = {cuda_device.compile_cubin(source, "sm_89") for source in SOURCES}
    paths.add(cuda_device.compile_cubin("filter_max", "sm_89", ("ZSAD_MASK=10",)))
    paths.add(cuda_device.compile_cubin("filter_max", "sm_89", ("ZSAD_NEAR_MASK=3",)))
    assert len(paths) == len(SOURCES) + 2
    for path in paths:
        check_elf(path.read_bytes())
    before = {path: path.stat().st_mtime_ns for path in paths}
    assert {cuda_device.compile_cubin(source, "sm_89") for source in SOURCES} < paths
    assert {path: path.stat().st_mtime_ns for path in paths} == before
